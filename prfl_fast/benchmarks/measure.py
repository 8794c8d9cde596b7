"""Times of one piece of work, and the speed of a plain copy beside which they are read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Work = Callable[[], object]

WARM_UPS = 3
LEAST_RUNS = 5
_FLUSH_BYTES = 2**28  # several times the last-level cache of any card
_MOST_FLUSHES = 32


@dataclass(frozen=True)
class Times:
    """Microseconds of single runs: median, 20th and 80th percentile, least, and how many runs there were."""

    median_us: float
    p20_us: float
    p80_us: float
    min_us: float
    runs: int

    @classmethod
    def of(cls, seconds: list[float]) -> Times:
        """From at least two runs."""
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        median, p20, p80, least = (
            round(1e6 * s, 3) for s in (statistics.median(seconds), cuts[1], cuts[7], min(seconds))
        )
        return cls(median, p20, p80, least, len(seconds))


def measure(work: Work, device: torch.device, seconds: float) -> Times:
    """Times of ``work``, run after a warm-up for about ``seconds`` and at least a few times.

    On a GPU the time is that of the device, between two events: before each run the cache is overwritten, and for as
    long as the host needs to launch the work, so that launches are not what is counted.
    """
    for _ in range(WARM_UPS):
        work()
    run = _DeviceRun(work, device) if device.type == "cuda" else _host_run(work)
    measured: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(measured) < LEAST_RUNS:
        measured.append(run())
    return Times.of(measured)


def copy_speed(device: torch.device, moved: int, seconds: float) -> float:
    """Bytes per second, read and written together, of a copy that moves ``moved`` bytes in all."""
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    return 8 * source.numel() / (measure(lambda: target.copy_(source), device, seconds).median_us / 1e6)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch runs with ``count`` threads inside; None leaves it alone."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _host_run(work: Work) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


class _DeviceRun:
    """One run on a GPU with a cold cache and a full queue."""

    def __init__(self, work: Work, device: torch.device) -> None:
        self.work, self.device = work, device
        self.buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.flushes = 1
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        launch = time.perf_counter() - start
        torch.cuda.synchronize(device)
        flush = self._between_events(self.buffer.zero_)
        self.flushes = min(_MOST_FLUSHES, 1 + int(launch / flush))

    def __call__(self) -> float:
        return self._between_events(self.work)

    def _between_events(self, work: Work) -> float:
        with torch.cuda.device(self.device):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(self.flushes):
                self.buffer.zero_()
            start.record()
            work()
            stop.record()
            stop.synchronize()
            return float(start.elapsed_time(stop)) / 1e3
