"""A clock that only moves when told to, and a synthetic table whose predictions can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from itertools import cycle
from typing import Any

from latency_tables.device import DeviceInfo
from latency_tables.foreign_cpu import CpuPool, CpuReading
from latency_tables.measure import WHOLE, Lap, Subject
from latency_tables.schema import LatencyEntry, LatencyTable
from prunefront.config import ModelSpec
from prunefront.geometry import block_key, geometry_for

TINY = ModelSpec(
    name="vit_tiny_patch16_224",
    img_size=32,
    kwargs={"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3},
)
NO_CLASS_TOKEN = ModelSpec(
    name="vit_tiny_patch16_224",
    img_size=32,
    kwargs={
        "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "class_token": False, "global_pool": "avg",
    },
)  # fmt: skip
DEVICE = DeviceInfo(kind="cpu", name="Abacus 3000", threads=2, cpu_features=("avx2",), versions={"torch": "2.6.0"})


class FakeClock:
    """Seconds since the start; work takes ``slowness(now)`` times as long as it says."""

    def __init__(self, slowness: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now_s = 0.0
        self._slowness = slowness

    def __call__(self) -> float:
        return self.now_s

    def work(self, ms: float) -> None:
        self.now_s += ms * 1e-3 * self._slowness(self.now_s)

    def subject(self, *ms: float, lap_name: str = WHOLE) -> Subject:
        """A subject of one lap whose runs take the given times in turn."""
        durations = cycle(ms)

        def run(lap: Lap) -> None:
            self.work(next(durations))
            lap(lap_name)

        return run

    def model(self, *ms: float) -> Callable[[Any], None]:
        """A forward whose calls take the given times in turn."""
        durations = cycle(ms)
        return lambda x: self.work(next(durations))


class FakeCpu:
    """Two cores and two threads; other processes take ``taken(now)`` cores. Sleeping moves the clock."""

    threads = 2

    def __init__(self, clock: FakeClock, taken: Callable[[float], float]) -> None:
        self._clock, self._taken = clock, taken
        self._read_at_s = self._used_s = 0.0

    def read(self) -> CpuReading:
        now = self._clock.now_s
        self._used_s += self._taken(now) * (now - self._read_at_s)
        self._read_at_s = now
        return CpuReading(at_s=now, own_s=0.0, pools=(CpuPool(cores=2.0, used_s=self._used_s),))

    def sleep(self, seconds: float) -> None:
        self._clock.now_s += seconds + 1e-6  # Never shorter than asked for, as a real one.


def entry(name: str, tokens_in: int, tokens_out: int, median_ms: float) -> LatencyEntry:
    return LatencyEntry(entry=name, tokens_in=tokens_in, tokens_out=tokens_out, median_ms=median_ms)


def table_of(entries: Iterable[LatencyEntry], **changes: Any) -> LatencyTable:
    """A table of the tiny model's blocks."""
    fields: dict[str, Any] = {
        "name": "synthetic",
        "device": DEVICE,
        "runtime": "eager",
        "dtype": "fp32",
        "batch_size": 8,
        "block_key": block_key(geometry_for(TINY)),
        "model": TINY,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "entries": tuple(entries),
    }
    return LatencyTable(**{**fields, **changes})


def simple_table(**changes: Any) -> LatencyTable:
    """Attention 2 ms a token, MLP 3 ms a token, measured at 2, 9 and 17 tokens; stem 5 ms, head 1 ms."""
    halves = [entry("attention", at, at, 2.0 * at) for at in (2, 9, 17)]
    halves += [entry("mlp", at, at, 3.0 * at) for at in (2, 9, 17)]
    ends = [entry("stem", 16, 17, 5.0), entry("head", 17, 1, 1.0)]
    # 4 ms for the reduction itself, at every point.
    reductions = [
        entry(f"block.{kind}", t_in, t_out, 2.0 * t_in + 3.0 * t_out + 4.0)
        for kind in ("evit.prune", "evit.fuse", "tome.merge")
        for t_in, t_out in ((17, 15), (17, 9), (9, 8), (9, 5))
    ]
    return table_of(changes.pop("entries", [*halves, *ends, *reductions]), **changes)
