"""The emulator finds planted faults (emulator/faults), and says what they are and where. Corrected twins of them pass.

A twin differs from its fault in nothing but the mistake, so an emulator that always complains fails here too.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import emulation

SOURCES = Path(__file__).parent / "faults"
LIBRARY = emulation.FOLDER / "libemulator_faults.so"
SEEDS = range(12)

# The emulator's message about each fault.
RACES = {
    "missing_sync_block": r"race: .* shared memory here, and a (read|write) by thread \d+ .*\(missing sync_block\)",
    "missing_sync_warp": r"race: read by all lanes of 16 bytes .*, and a write by thread \d+ .*\(missing sync_warp\)",
    "race_between_warps": r"race: .* offset 0 .*, and a (read|write) by thread \d+ .*\(missing sync_block\)",
    "race_between_lanes": r"race: .* shared memory here, and a (read|write) by thread \d+ .*\(missing sync_warp\)",
    "race_in_global_memory": r"race: write of 1 byte at byte \d+ of `out` here, and a write .*\(missing sync_block\)",
    "overwritten_broadcast": r"race: .*, and (reads by several|a write by thread 0) .*\(missing sync_(block|warp)\)",
    "overwritten_broadcast_in_warp": r"race: .*, and (reads by several|a write by thread 0) .*\(missing sync_warp\)",
    "copies_shared_without_barrier": r"race: .*, and a (read|write) by thread \d+ .*\(missing sync_block\)",
    "blocks_add_to_one_sum": r"blocks \d and \d depend on the order of blocks: .* `out`, which the other one wrote",
    "block_reads_what_another_wrote": r"blocks \d and \d depend on the order of blocks: .* `out`, which the other one",
    "block_overwrites_what_others_read": r"depends? on the order of blocks: .* `out`, which the other one (read|wrote)",
}
FAULTS = RACES | {
    "missing_wait_copies": r"read .* an asynchronous copy of thread \d+ .* is in flight \(missing wait_copies\)",
    "waits_for_too_few_copies": r"read .* an asynchronous copy of its own .* is in flight \(missing wait_copies\)",
    "copies_never_waited_for": r"1 asynchronous copy is in flight when the thread exits \(missing wait_copies\)",
    "off_by_one_in_global_memory": r"out of bounds: write of 4 bytes, 0 bytes past the end of `out`",
    "off_by_one_in_shared_memory": r"out of bounds: write of 4 bytes at offset (\d+) of \1 bytes of shared memory",
    "vector_past_the_end": r"out of bounds: read of \d+ bytes, .* past the end of `x`",
    "copy_past_the_end": r"out of bounds: read of 16 bytes, the last 8 of them past the end of `x`",
    "write_to_input": r"write of 4 bytes at byte \d+ of `x`, which the kernel may only read",
    "index_overflow": r"out of bounds: read of 1 byte, \d+ bytes before `x`",
    "unwritten_shared_memory": r"read of 4 bytes at offset \d+ .* shared memory before anything is written there",
    "shared_memory_of_another_block": r"read of 4 bytes at offset \d+ .* before anything is written there",
    "misaligned_load": r"misaligned: read of 16 bytes at byte 20 of `x`, which must be a multiple of 16",
    "misaligned_store": r"misaligned: write of 16 bytes at byte 8 of `out`, which must be a multiple of 16",
    "misaligned_matrix_row": r"misaligned load_matrices",
    "divergent_barrier": r"divergent barrier: barrier at \S+ reached by 32 of 64 live threads, the others wait in",
    "barrier_not_reached": r"barrier at \S+ reached by 33 of 64 live threads, the others wait in shuffle at \S+",
    "shuffle_without_a_lane": r"shuffle at \S+ reached by 31 of 32 lanes of warp \d, lane 31 has exited",
    "stack_overflow": r"stack overflow",
}
# Not at one line of a kernel: launches that no device takes, and a wrong result.
ELSEWHERE = {
    "grid_y_too_large": r"grid.y is 65536, the most is 65535",
    "shared_memory_without_opting_in": r"dynamic shared memory is 65536 bytes, the most is 49152",
    "wrong_mma_layout": r"wrong product at \(\d+, \d+\)",
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if not LIBRARY.exists():
        if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            pytest.skip("no C++ compiler to make the emulator with")
        pytest.fail(f"{LIBRARY} is missing: make emulator")
    return ctypes.CDLL(str(LIBRARY))


def call(library: ctypes.CDLL, function: str, *arguments: Any, seed: int = emulation.SEED) -> str | None:
    """Calls a function of the library that launches a kernel; returns the message that the launch failed with, or
    None."""
    library.xlayer_emulator_set_seed(ctypes.c_uint64(seed))
    message = ctypes.create_string_buffer(1000)
    ended = getattr(library, function)(*arguments, message, len(message))
    assert ended in (0, 1), f"nothing has the name {arguments[0]}"
    return message.value.decode() if ended else None


def run(library: ctypes.CDLL, name: str, *, fixed: bool, seed: int = emulation.SEED) -> str | None:
    return call(library, "run_fault", name.encode(), int(fixed), seed=seed)


def lines_of(name: str) -> set[str]:
    """Returns the lines of the sources where the fault can be noticed, which are marked by a comment, as messages name
    them."""
    return {
        f"tests/emulator/faults/{file.name}:{number}"
        for file in SOURCES.glob("*.cu")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if line.endswith(f"// fault: {name}")
    }


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(library: ctypes.CDLL, name: str) -> None:
    message = run(library, name, fixed=False)
    assert message is not None
    where = re.fullmatch(rf"{name}: .*{FAULTS[name]}.* \(block \d+, thread \d+, (\S+:\d+)\)", message)
    assert where is not None, message
    assert where[where.re.groups] in lines_of(name)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_fault_without_a_line_is_found(library: ctypes.CDLL, name: str) -> None:
    message = run(library, name, fixed=False)
    assert message is not None
    assert re.match(rf"{name}: .*{ELSEWHERE[name]}", message), message


@pytest.mark.parametrize("name", FAULTS | ELSEWHERE)
def test_corrected_twin_passes(library: ctypes.CDLL, name: str) -> None:
    assert run(library, name, fixed=True) is None


def test_every_planted_fault_is_tested() -> None:
    planted = "".join(file.read_text() for file in SOURCES.glob("*.cu"))
    assert set(re.findall(r'const Fault \w+\("(\w+)"', planted)) == set(FAULTS | ELSEWHERE)


@pytest.mark.parametrize("name", RACES)
def test_race_is_found_in_every_order(library: ctypes.CDLL, name: str) -> None:
    """A race is found whatever the order of blocks and threads made of the result."""
    for seed in SEEDS:
        message = run(library, name, fixed=False, seed=seed)
        assert message is not None
        assert re.search(RACES[name], message), message
        assert run(library, name, fixed=True, seed=seed) is None


def test_seeds_change_the_order(library: ctypes.CDLL) -> None:
    """With another seed other threads and other blocks are the first to meet the same race."""
    for name in ("race_between_warps", "blocks_add_to_one_sum"):
        assert len({run(library, name, fixed=False, seed=seed) for seed in SEEDS}) > 1


def test_order_changes_no_bit_of_a_correct_kernel(library: ctypes.CDLL) -> None:
    results = set()
    for seed in SEEDS:
        sums = (ctypes.c_float * 7)()
        assert call(library, "run_sums", sums, seed=seed) is None
        results.add(bytes(sums))
    assert len(results) == 1
    assert any(results.pop())


def test_a_launch_after_a_fault_is_sound(library: ctypes.CDLL) -> None:
    """A launch is not disturbed by what an abandoned one left: threads, copies, records of memory."""
    for name in FAULTS:
        assert run(library, name, fixed=False) is not None
        assert run(library, "missing_sync_block", fixed=True) is None


# Steps of faults/program.cu: who, what, at which byte of shared memory, how many bytes.
READ, WRITE, SYNC_WARP, SYNC_BLOCK = range(4)
Step = tuple[int, int, int, int]
accesses = st.builds(
    lambda thread, what, bytes, at: (thread, what, at // bytes * bytes, bytes),
    st.sampled_from((0, 1, 2, 32, 33)),
    st.sampled_from((READ, WRITE)),
    st.sampled_from((1, 2, 4)),
    st.integers(0, 15),
)
barriers = st.sampled_from(((0, SYNC_WARP, 0, 0), (1, SYNC_WARP, 0, 0), (0, SYNC_BLOCK, 0, 0)))


def has_race(program: list[Step]) -> bool:
    """Tells, pair by pair, whether two threads access a byte, one of them writes, and no barrier of both lies
    between."""
    seen: list[tuple[Step, int, int]] = []
    phase, turns = 0, [0, 0]
    for step in program:
        who, what, at, size = step
        if what == SYNC_BLOCK:
            phase += 1
        elif what == SYNC_WARP:
            turns[who] += 1
        else:
            turn = turns[who // 32]
            for (other, did, start, length), other_phase, other_turn in seen:
                meets = at < start + length and start < at + size and WRITE in (what, did) and other != who
                ordered = other_phase != phase or (other // 32 == who // 32 and other_turn != turn)
                if meets and not ordered:
                    return True
            seen.append((step, phase, turn))
    return False


@given(program=st.lists(accesses | barriers, max_size=40), seed=st.integers(0, 2**64 - 1))
@example(program=[(0, READ, 0, 4), (32, READ, 0, 4), (1, SYNC_WARP, 0, 0), (32, WRITE, 2, 2)], seed=0)
def test_a_race_is_found_exactly_where_there_is_one(library: ctypes.CDLL, program: list[Step], seed: int) -> None:
    steps = (ctypes.c_int32 * (4 * len(program)))(*(number for step in program for number in step))
    message = call(library, "run_program", steps, len(program), seed=seed)
    assert (message is not None) == has_race(program), message
    assert message is None or message.startswith("program: race: ")
