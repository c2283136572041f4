"""Names the source files that docs link to: a page has {source}`hyper/contract`, which this table resolves."""

from __future__ import annotations

SOURCES = {
    # family hdim
    "hdim/reference": "xlayer_ext/reference/hdim.py",
    "hdim/functional": "xlayer_ext/functional/hdim.py",
    "hdim/contract": "csrc/include/xlayer/hdim.h",
    # family hyper
    "hyper/reference": "xlayer_ext/reference/hyper.py",
    "hyper/contract": "csrc/include/xlayer/hyper.h",
    "hyper/cuda-backward": "csrc/cuda/hyper/backward.cu",
    "hyper/cuda-backward-coefficients": "csrc/cuda/hyper/backward_coefficients.cu",
    "hyper/cuda-backward-streams": "csrc/cuda/hyper/backward_streams.cu",
    # family quantize
    "quantize/reference": "xlayer_ext/reference/quantize.py",
    "quantize/contract": "csrc/include/xlayer/quantize.h",
    "quantize/cuda-search": "csrc/cuda/quantize/search.cuh",
    # family aggregate
    "aggregate/reference": "xlayer_ext/reference/aggregate.py",
    "aggregate/contract": "csrc/include/xlayer/aggregate.h",
    # what the families share
    "cpu/simd": "csrc/cpu/common/simd.h",
    "cpu/isa": "csrc/cpu/common/isa.cpp",
    "cuda/device": "csrc/cuda/common/device.cuh",
    "cuda/fragment": "csrc/cuda/common/fragment.cuh",
    "build/setup": "setup.py",
    # systems
    "systems/registry": "python/xlayer_systems/registry.py",
    "systems/spec": "python/xlayer_systems/runs/spec.py",
    "systems/options": "python/xlayer_systems/training/options.py",
    "systems/trainer": "python/xlayer_systems/training/trainer.py",
    "systems/protocol": "python/xlayer_systems/runs/system.py",
    "xlrb/config": "python/xlayer_systems/xlrb/config.py",
    "xlrb/presets": "python/xlayer_systems/xlrb/presets.py",
    "xlrb/bridge": "python/xlayer_systems/xlrb/bridge.py",
    "telepathy/config": "python/xlayer_systems/telepathy/config.py",
    "telepathy/presets": "python/xlayer_systems/telepathy/presets.py",
    "telepathy/bridge": "python/xlayer_systems/telepathy/bridge.py",
    "lformer/config": "python/xlayer_systems/lformer/config.py",
    "lformer/model": "python/xlayer_systems/lformer/model.py",
    "lformer/system": "python/xlayer_systems/lformer/system.py",
    "bypass/config": "python/xlayer_systems/bypass/config.py",
    "bypass/model": "python/xlayer_systems/bypass/model.py",
    "hyper_lm/config": "python/xlayer_systems/hyper_lm/config.py",
    "hyper_lm/attach": "python/xlayer_systems/hyper_lm/attach.py",
    # proof
    "tests/oracle": "tests/support/oracle.py",
    "tests/operators": "tests/support/operator_table.py",
    "tests/routing": "tests/ops/test_routing.py",
    "tests/presets": "tests/systems/test_xlrb_presets.py",
    "tests/resources": "tests/emulator/test_kernel_resources.py",
    "benchmarks/bounds": "benchmarks/report/bounds.py",
    "benchmarks/gpu-check": "benchmarks/gpu_check.sh",
    "benchmarks/rows": "benchmarks/results/xeon-amx-avx512-2core.jsonl",
}

# Where the files of a family lie: a folder of its name, or files whose names begin with one of these.
FAMILIES = {
    "hdim": ("hdim", "routing"),
    "hyper": ("hyper",),
    "quantize": ("quantize",),
    "aggregate": ("aggregate",),
}
LAYERS = {
    "contract": "csrc/include/xlayer",
    "operators": "csrc/torch",
    "CPU kernels": "csrc/cpu",
    "CUDA kernels": "csrc/cuda",
}
