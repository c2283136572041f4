"""The roof of a processor: rates and clock from the best blocks, caches by size, and what it refuses to measure."""

import pytest

from benchmarks.harness import roof

needs_roof = pytest.mark.skipif(not roof.isas(), reason="no _native")


class FakeRoof:
    """A processor of known speed whose host takes it away in some blocks: 2 pipes of 8 numbers at 1 GHz, 2 threads."""

    isa, threads = "avx2", 2

    def __init__(self, disturbed=lambda block: False):
        self.disturbed, self.calls = disturbed, 0

    def lanes(self, dtype):
        return {"float32": 8, "float64": 4}[dtype]

    def flops_per_step(self, dtype):
        return 2 * self.lanes(dtype) * 12 * self.threads

    def multiply_adds(self, dtype, steps, additions, blocks):
        times = (steps * 6e-9, additions * 1e-9)  # 12 multiply-adds in 6 cycles of 1 ns
        return [tuple(9 * t if self.disturbed(block) else t for t in times) for block in range(blocks)]

    def move(self, kind, footprint, blocks):
        self.calls += 1
        rate = {
            "copy": 3e9,
            "streaming copy": 5e9,
            "copy in streams": 4.5e9,
            "library copy": 4e9,
            "read": 5.5e9,
            "read in streams": 6e9,
            "write": 1e9,
            "streaming write": 2e9,
        }
        return footprint, [footprint / rate[kind] * (1 if self.calls > len(rate) else 2)] * blocks


def test_rates_are_those_of_the_best_blocks():
    work = roof.MultiplyAdds(FakeRoof(lambda block: block % 7), "float32")
    work()
    assert work.rate == pytest.approx(2 * 2 * 8 * 2 * 1e9)
    assert work.clock == pytest.approx(1e9)
    assert work.facts() == pytest.approx(
        {"isa": "avx2", "dtype": "float32", "threads": 2, "rate": 64e9, "clock": 1e9, "pipes": 2, "of_pipes": 1.0}
    )
    work.roof = FakeRoof(lambda block: True)  # a slow round takes nothing back
    work()
    assert work.rate == pytest.approx(64e9) and work.clock == pytest.approx(1e9)


def test_the_clock_is_that_of_the_best_multiply_adds():
    """A clock that rises while narrow work runs must not count against the wide vectors."""

    class Rising(FakeRoof):
        def multiply_adds(self, dtype, steps, additions, blocks):
            early = super().multiply_adds(dtype, steps, additions, blocks)
            return [
                (5 * wide, chain / 1.2) if block > 80 else (wide, chain) for block, (wide, chain) in enumerate(early)
            ]

    work = roof.MultiplyAdds(Rising(), "float64")
    work()
    assert work.clock == pytest.approx(1e9) and work.rate == pytest.approx(32e9)


def test_bytes_take_the_best_way_of_the_best_round():
    moves = roof.Moves(FakeRoof(), 1 << 20)
    moves()
    assert moves.facts() == pytest.approx({"copy_rate": 2.5e9, "read_rate": 3e9, "write_rate": 1e9})
    moves()
    assert moves.facts() == pytest.approx({"copy_rate": 5e9, "read_rate": 6e9, "write_rate": 2e9})
    assert moves.rate == 6e9


def test_the_level_is_that_of_all_threads_caches(monkeypatch):
    caches = {"L1": (32 << 10, 1), "L2": (1 << 20, 1), "L3": (32 << 20, 8)}
    monkeypatch.setattr(roof, "cache_levels", lambda: caches)
    assert roof.capacities(2) == {"L1": 64 << 10, "L2": 2 << 20, "L3": 32 << 20}
    assert roof.capacities(16)["L3"] == 64 << 20
    found = [roof.level_of(size, 2) for size in (60_000, 2 << 20, 3 << 20, 1 << 30)]
    assert found == ["L1", "L2", "L3", "memory"]
    footprint, enough = roof.memory_footprint(2)
    assert footprint == 256 << 20 or not enough
    assert [roof._count(text) for text in ("0", "0-3", "0-1,8-9", "")] == [1, 4, 4, 1]


@needs_roof
@pytest.mark.parametrize("isa", roof.isas())
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_multiply_adds_are_explained_by_pipes_and_clock(isa, dtype):
    """The measured rate is no more than the pipes can do at the clock of the same blocks, on a busy machine too."""
    work = roof.MultiplyAdds(roof._native.Roof(isa, 1), dtype)
    for _ in range(4):
        work()
    lanes = {"avx512": 64, "avx2": 32, "baseline": 16}[isa] // (4 if dtype == "float32" else 8)
    assert work.roof.lanes(dtype) == lanes
    assert 0 < work.rate <= 1.02 * 2 * lanes * work.pipes * work.clock
    assert work.pipes <= 4 and 1e8 < work.clock < 1e10


@needs_roof
def test_every_way_of_moving_counts_what_it_moves():
    native = roof._native.Roof("baseline", 2)
    for kind in roof.MOVES:
        moved, seconds = native.move(kind, 1 << 20, 3)
        assert moved % (1 << 20) == 0 and moved >= 4 << 20 and len(seconds) == 3
        assert 1e6 < moved / min(seconds) < 1e14
    moved, _ = native.move("copy", 24 << 20, 1)
    assert moved == 24 << 20  # half of them read, half of them written
    assert roof.Moves(native, 24 << 20).blocks >= 1


@needs_roof
def test_the_roof_refuses_what_it_cannot_measure():
    make = roof._native.Roof
    for arguments, says in ((("mmx", 1), "isa: this processor cannot run mmx"), (("baseline", 0), "threads: expected")):
        with pytest.raises(ValueError, match=says):
            make(*arguments)
    native = make("baseline", 1)
    for call, says in (
        (lambda: native.lanes("float16"), "dtype: expected float32 or float64, got float16"),
        (lambda: native.move("push", 1, 1), "kind: got unknown push"),
        (lambda: native.move("copy", 1 << 50, 1), "at most 2\\^46 bytes"),
        (lambda: native.multiply_adds("float32", 0, 64, 1), "expected at least 1"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
