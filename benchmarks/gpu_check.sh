#!/usr/bin/env bash
# Everything that only a GPU can say, on a machine with an NVIDIA GPU and no network, in under nine minutes.
#
#   benchmarks/gpu_check.sh [--dry-run] OUT_DIR [PART...]
#
# PART: build     cmake for the GPU found, objects in build/gpu, the libraries beside the package in this checkout
#       test      the kernels' tests with --device cuda
#       sanitize  compute-sanitizer's four tools over benchmarks/gpu/cases.py
#       bench     benchmarks of every family, rows in OUT_DIR/<gpu>.jsonl
#       profile   Nsight Compute on one launch of each kernel of hdim and hyper
#       all       the default: all of these; `dry` is --dry-run
#
# Each part writes OUT_DIR/<part>.log, and goes on without the others; summary.txt has a line for each. A part gets its
# share of the time that is left, so what one saves the next may use. Exits with 1 if a part failed.
#
# Needs a Python (PYTHON, default python3) with torch, cmake, ninja, pybind11, pytest and hypothesis, nvcc and the
# tools named above; nothing is installed. --dry-run needs no GPU and none of CUDA's tools: the same commands with the
# kernels on the emulator (`make emulator` first), at sizes that take seconds, and nothing is compiled.
set -euo pipefail

readonly parts=(build test sanitize bench profile)
declare -A shares=([build]=6 [test]=5 [sanitize]=3 [bench]=5 [profile]=2)
readonly total=${GPU_CHECK_SECONDS:-520}

usage() {
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}

# --- The parts: each runs in a shell of its own, its output in its log ------------------------------------------------

part_build() {
    local folder=build/gpu
    [[ $dry ]] && folder=$scratch/build
    nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader || [[ $dry ]]
    cmake -S . -B "$folder" -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DXLAYER_CUDA=ON
    if [[ $dry ]]; then
        cmake --build "$folder" -- -n  # says what it would do
    else
        cmake --build "$folder" --parallel "$(nproc)"
    fi
    "$python" -m xlayer_ext.info
}

part_test() {
    local files=(tests/ops tests/nn tests/build/test_{build,info}.py) options=()
    # Each worker is a process with its own CUDA context; the tests are far from filling the GPU.
    "$python" -c 'import xdist' 2>/dev/null && options=(-n 8)
    [[ $dry ]] && files=(tests/ops/test_routing.py) && options=(-k oracle_rule)
    local pytest=("$python" -m pytest -q -p no:cacheprovider --device "$device") failed=0
    "${pytest[@]}" "${options[@]}" "${files[@]}" || failed=1
    [[ $dry ]] || "${pytest[@]}" -m cuda tests/bench/test_bench.py || failed=1  # it takes times, with nothing beside it
    return "$failed"
}

part_sanitize() {
    local cases=("$python" -m benchmarks.gpu.cases --device "$device") failed=0 tool
    if [[ $dry ]]; then
        echo "compute-sanitizer: left out in a dry run; the cases alone:"
        "${cases[@]}"
        return
    fi
    # All four at once, each with a limit of its own, so that a slow one does not take the others' findings with it.
    # Tensors of their own allocations, so that no write past the end of one lands in another. Our kernels alone are
    # watched, except by initcheck, which has to know what torch's have written.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local common=(--target-processes application-only --error-exitcode 66 --print-limit 1000)
    local ours=(--kernel-name kns=xlayer)
    declare -A options=([memcheck]="--padding 64 --report-api-errors no ${ours[*]}" [racecheck]="${ours[*]}"
        [initcheck]="" [synccheck]="${ours[*]}")
    for tool in memcheck racecheck initcheck synccheck; do
        # shellcheck disable=SC2086
        (code=0
            timeout "$((limit * 9 / 10))" compute-sanitizer --tool "$tool" "${common[@]}" ${options[$tool]} \
                "${cases[@]}" >"$scratch/$tool.txt" 2>&1 || code=$?
            echo "exit code $code" >>"$scratch/$tool.txt") &
    done
    wait
    for tool in memcheck racecheck initcheck synccheck; do
        "$python" -m benchmarks.gpu.sanitizer_report "$tool" "$scratch/$tool.txt" || failed=1
    done
    return "$failed"
}

part_bench() {
    local failed=0 rows
    rows=$out/$(gpu_file).jsonl
    rm -f "$rows"
    bench() {
        echo "--- $*"
        "$python" -m benchmarks "$@" --device "$device" --out "$rows" || failed=1
    }
    if [[ $dry ]]; then
        bench hdim --quick --no-compile --dtype bfloat16 float32
        bench hyper --quick --no-compile --op boundary
        bench quantize --quick --no-compile --op nearest statistics fsq
        bench aggregate --quick --no-compile --op ema gru attention
        bench routing --quick --no-compile
    else
        bench hdim --seconds 2 --dtype bfloat16
        bench hdim --seconds 2 --case B32-S512 --dtype float32 float16
        bench hyper --seconds 1 --dtype bfloat16 --op boundary pre+post --pass fwd bwd
        bench quantize --seconds 1 --dtype bfloat16 float32 --op nearest statistics fsq
        bench aggregate --seconds 1 --dtype bfloat16 --op ema ema-last gru attention
        bench routing --seconds 1 --dtype bfloat16 float32
    fi
    return "$failed"
}

part_profile() {
    if [[ $dry ]]; then
        echo "ncu: left out in a dry run"
        return
    fi
    local sections=() name
    for name in SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis LaunchStats Occupancy WarpStateStats; do
        sections+=(--section "$name")
    done
    ncu --clock-control none --kernel-name-base demangled --kernel-name regex:xlayer "${sections[@]}" \
        --page raw --csv --print-units base "$python" -m benchmarks.gpu.cases --large >"$scratch/ncu.csv" ||
        { tail -n 20 "$scratch/ncu.csv" && return 1; }
    "$python" -m benchmarks.gpu.ncu_table <"$scratch/ncu.csv"
}

# The file name of this GPU's rows.
gpu_file() {
    [[ $dry ]] && echo emulator && return
    "$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name().lower()))'
}

# --- The frame --------------------------------------------------------------------------------------------------------

dry=
[[ ${1:-} == --dry-run ]] && dry=1 && shift
[[ $# -ge 1 && $1 != -* ]] || usage
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
chosen=" ${*:-all} "
for word in $chosen; do
    case " ${parts[*]} all dry " in
        *" $word "*) ;;
        *) usage ;;
    esac
done
[[ $chosen == *" dry "* ]] && dry=1
[[ $chosen == *" all "* || $chosen == " dry " ]] && chosen=" ${parts[*]} "

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=cuda
[[ $dry ]] && device=emulated
PATH=$(dirname "$(command -v "$python")"):$PATH  # cmake and ninja of the same environment
[[ -d /usr/local/cuda/bin ]] && PATH=$PATH:/usr/local/cuda/bin
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PATH dry out python device scratch
export -f gpu_file
export -f "${parts[@]/#/part_}"

summary=$out/summary.txt
: >"$summary"
failed=0
ends=$((SECONDS + total))
for part in "${parts[@]}"; do
    [[ $chosen == *" $part "* ]] || continue
    left=0
    for later in "${parts[@]}"; do
        [[ $chosen == *" $later "* ]] && left=$((left + shares[$later]))
    done
    chosen=${chosen/ $part / }
    limit=$(((ends - SECONDS) * shares[$part] / left))
    begin=$SECONDS
    verdict=ok
    limit=$limit timeout --kill-after=5 "$limit" bash -euo pipefail -c "part_$part" >"$out/$part.log" 2>&1 </dev/null || verdict=failed
    line="$part $verdict $((SECONDS - begin)) s"
    [[ $verdict == ok ]] || failed=1
    [[ $verdict == ok || $((SECONDS - begin)) -lt $limit ]] || line+=", stopped at its limit"
    echo "$line" >>"$summary"
    echo "$line"
    [[ $verdict == ok ]] || tail -n 15 "$out/$part.log"
done

# What was measured, also by a part that was stopped.
rows=("$out"/*.jsonl)
if [[ -e ${rows[0]} ]]; then
    "$python" -c 'import sys; from benchmarks.harness import cases, measure
for path in sys.argv[1:]: print(cases.format_table(measure.read_rows(path)))' "${rows[@]}" || failed=1
fi
[[ ! -s $out/profile.log ]] || tail -n 30 "$out/profile.log"
exit "$failed"
