"""Prints two lines per kernel from the output of `ncu --page raw --csv --print-units base` on stdin.

Names of metrics differ between GPUs and versions, so they are found by pattern; the largest one counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from xlayer_systems.profiling.nsight_tables import read_ncu

PERCENT = r".*\.avg\.pct_of_peak_sustained_(active|elapsed)$"
# label: (pattern of the metric's name, unit to print, factor)
METRICS = {
    "time": (r"gpu__time_duration\.sum$", "us", 1e-3),
    "tensor pipe": (r"sm__(inst_executed_)?pipe_tensor" + PERCENT, "%", 1.0),
    "FMA pipe": (r"sm__(inst_executed_)?pipe_fma" + PERCENT, "%", 1.0),
    "ALU pipe": (r"sm__(inst_executed_)?pipe_alu" + PERCENT, "%", 1.0),
    "DRAM": (r"(gpu__)?dram__?throughput" + PERCENT, "%", 1.0),
    "L1": (r"l1tex__throughput" + PERCENT, "%", 1.0),
    "occupancy": (r"sm__warps_active" + PERCENT, "%", 1.0),
    "registers": (r"launch__registers_per_thread$", "", 1.0),
    "shared": (r"launch__shared_mem_per_block_dynamic$", "B", 1.0),
    "blocks": (r"launch__grid_size$", "", 1.0),
    "threads": (r"launch__block_size$", "", 1.0),
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)(_not_issued)?_per_issue_active\.ratio$")


def table(lines: Iterable[str]) -> list[str]:
    """Formats two lines per kernel launch: its utilization and launch, and the most frequent stalls of its warps."""
    out = []
    for launch in read_ncu(lines):
        shown = []
        for label, (pattern, unit, factor) in METRICS.items():
            found = launch.largest(pattern)
            shown.append(f"{label} {found * factor:.4g} {unit}".rstrip() if found is not None else f"{label} -")
        out.append(f"{launch.kernel}: {', '.join(shown)}")
        matches = ((STALL.match(name), value) for name, value in launch.metrics.items())
        stalls = {match[1]: value for match, value in matches if match and not match[2]}
        worst = sorted(stalls, key=stalls.__getitem__, reverse=True)[:4]
        out.append("    warps wait per instruction: " + ", ".join(f"{name} {stalls[name]:.2f}" for name in worst))
    return out


def main() -> int:
    lines = table(sys.stdin)
    print("\n".join(lines) or "no kernel was profiled")
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())
