"""Judges of the planner, written apart from it: an event simulator, brute force, HiGHS, and counts of equal blocks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from prfl_fast.memory import Mode

Blocks = list[list[Mode]]


class Device:
    """Named allocations, their peak, and a clock in ns."""

    def __init__(self, bytes_per_second: int | None) -> None:
        self.live: dict[str, int] = {}
        self.peak = 0
        self.clock = 0
        self.rate = bytes_per_second

    def allocate(self, name: str, size: int) -> None:
        assert name not in self.live
        self.live[name] = size
        self.peak = max(self.peak, sum(self.live.values()))

    def free(self, name: str) -> int:
        return self.live.pop(name)

    def copy_ends(self, size: int) -> int:
        """When a copy that starts now is over; a started nanosecond counts whole."""
        if size == 0:
            return self.clock
        assert self.rate is not None
        return self.clock + (size * 10**9 + self.rate - 1) // self.rate


def simulate(blocks: Blocks, choice: Sequence[int], bytes_per_second: int | None = None) -> tuple[int, int, int]:
    """Runs one forward and one backward, event by event: peak bytes, added ns, host bytes."""
    modes = [block[index] for block, index in zip(blocks, choice, strict=True)]
    device = Device(bytes_per_second)
    host = 0
    for i, mode in enumerate(modes):
        arrival = device.copy_ends(modes[i - 1].offloaded if i else 0)
        device.allocate("work", mode.forward_peak)
        device.clock = max(device.clock + mode.forward_ns, arrival)  # barrier
        if i:
            host += device.free(f"leaving {i - 1}")
        device.free("work")
        device.allocate(f"kept {i}", mode.kept)
        device.allocate(f"leaving {i}", mode.offloaded)
    last = len(modes) - 1
    device.clock = device.copy_ends(modes[last].offloaded)
    host += device.free(f"leaving {last}")
    most_on_host = host
    device.clock = device.copy_ends(modes[last].offloaded)
    device.allocate(f"back {last}", modes[last].offloaded)
    for i in range(last, -1, -1):
        mode = modes[i]
        device.free(f"back {i}")  # counted in the transient from here on
        if i:
            device.allocate(f"back {i - 1}", modes[i - 1].offloaded)
        arrival = device.copy_ends(modes[i - 1].offloaded if i else 0)
        device.allocate("work", mode.backward_transient)
        device.clock = max(device.clock + mode.backward_ns + mode.extra_ns, arrival)
        device.free("work")
        device.free(f"kept {i}")
    assert not device.live
    plain = sum(mode.forward_ns + mode.backward_ns for mode in modes)
    return device.peak, device.clock - plain, most_on_host


def brute_force(
    blocks: Blocks, budget: int, host: int = 0, bytes_per_second: int | None = None
) -> tuple[int | None, int]:
    """The least added time within the budget (None: no plan fits) and the least peak, by trying every plan."""
    fastest: int | None = None
    least: int | None = None
    for choice in itertools.product(*(range(len(block)) for block in blocks)):
        if sum(block[m].offloaded for block, m in zip(blocks, choice, strict=True)) > host:
            continue
        peak, added, _ = simulate(blocks, choice, bytes_per_second)
        least = peak if least is None else min(least, peak)
        if peak <= budget:
            fastest = added if fastest is None else min(fastest, added)
    assert least is not None
    return fastest, least


def by_counts(block: list[Mode], count: int, budget: int) -> int | None:
    """Least added time of ``count`` equal blocks without offload: every way to share them out among the modes.

    An order with the least peak has ``peak - kept`` falling (exchange two neighbours to see it).
    """
    peaks = [max(mode.forward_peak, mode.kept + mode.backward_transient) for mode in block]
    order = sorted(range(len(block)), key=lambda m: block[m].kept - peaks[m])
    best: int | None = None
    for bars in itertools.combinations(range(count + len(block) - 1), len(block) - 1):
        edges = [-1, *bars, count + len(block) - 1]
        counts = [b - a - 1 for a, b in itertools.pairwise(edges)]
        prefix = peak = added = 0
        for m, times in zip(order, counts, strict=True):
            if times:
                prefix += times * block[m].kept
                peak = max(peak, prefix - block[m].kept + peaks[m])
                added += times * block[m].extra_ns
        if peak <= budget and (best is None or added < best):
            best = added
    return best


def uniform(blocks: Blocks, budget: int, host: int, bytes_per_second: int | None) -> int | None:
    """Least added time of one mode for all blocks; None: none fits."""
    fitting = []
    for m in range(min(map(len, blocks))):
        peak, added, on_host = simulate(blocks, [m] * len(blocks), bytes_per_second)
        if peak <= budget and on_host <= host:
            fitting.append(added)
    return min(fitting, default=None)


def greedy(blocks: Blocks, budget: int, host: int, bytes_per_second: int | None) -> int | None:
    """Added time of the greedy plan: from the leanest modes on, the change of one block that saves most time per
    further byte (of equal ones the first), while one fits; None: the leanest modes don't fit."""

    def size(mode: Mode) -> tuple[int, int]:
        whole = max(mode.forward_peak, mode.kept + mode.backward_transient)
        return mode.kept + mode.offloaded, whole

    # A mode that the host can't hold by itself is no mode.
    allowed = [[m for m, mode in enumerate(block) if mode.offloaded <= host] for block in blocks]
    choice = [min(ms, key=lambda m: size(block[m])) for ms, block in zip(allowed, blocks, strict=True)]
    peak, added, on_host = simulate(blocks, choice, bytes_per_second)
    if peak > budget or on_host > host:
        return None
    while True:
        best, changed = Fraction(0), None
        for i, block in enumerate(blocks):
            for m in allowed[i]:
                other = [*choice[:i], m, *choice[i + 1 :]]
                peak, after, on_host = simulate(blocks, other, bytes_per_second)
                if peak <= budget and on_host <= host and after < added:
                    gain = Fraction(added - after, max(1, size(block[m])[0] - size(block[choice[i]])[0]))
                    if gain > best:
                        best, changed = gain, (other, after)
        if changed is None:
            return added
        choice, added = changed


def highs(blocks: Blocks, budget: int, host: int, bytes_per_second: int | None) -> list[int] | None:
    """The best plan as a mixed-integer program solved by HiGHS; None: infeasible.

    One binary per mode; two continuous stalls per boundary, the last one's among them. Sizes up to some thousands, so
    that HiGHS's tolerances (1e-6) are far below one byte or nanosecond.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    start = np.cumsum([0, *map(len, blocks)])
    n, binaries = len(blocks), int(start[-1])
    size = binaries + 2 * n  # stalls of the copies of block i: out at binaries + 2 i, in at binaries + 2 i + 1
    cost = np.zeros(size)
    cost[binaries:] = 1
    rows, upper = [], []

    def row(limit: float) -> np.ndarray:
        rows.append(np.zeros(size))
        upper.append(limit)
        return rows[-1]

    def copy(mode: Mode) -> int:
        return -(-mode.offloaded * 10**9 // bytes_per_second) if mode.offloaded and bytes_per_second else 0

    capacity = row(host)
    for i, block in enumerate(blocks):
        memory, out, back = row(budget), row(0), row(0)
        for j in range(i):
            for m, mode in enumerate(blocks[j]):
                memory[start[j] + m] = mode.kept + (mode.offloaded if j == i - 1 else 0)
        for m, mode in enumerate(block):
            at = start[i] + m
            cost[at] = mode.extra_ns
            capacity[at] = mode.offloaded
            memory[at] = max(mode.forward_peak, mode.kept + mode.backward_transient)
            out[at] = back[at] = copy(mode)
        out[binaries + 2 * i] = back[binaries + 2 * i + 1] = -1
        if i + 1 < n:
            for m, mode in enumerate(blocks[i + 1]):
                out[start[i + 1] + m] = -mode.forward_ns
                back[start[i + 1] + m] = -mode.backward_ns - mode.extra_ns
    one_each = np.zeros((n, size))
    for i in range(n):
        one_each[i, start[i] : start[i + 1]] = 1
    integral = np.zeros(size)
    integral[:binaries] = 1
    bounds = Bounds(np.zeros(size), np.where(integral > 0, 1, np.inf))
    result = milp(
        cost,
        constraints=[LinearConstraint(np.array(rows), ub=np.array(upper)), LinearConstraint(one_each, 1, 1)],
        integrality=integral,
        bounds=bounds,
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        return None
    return [int(np.argmax(result.x[start[i] : start[i + 1]])) for i in range(n)]


def random_mode(rng: random.Random, scale: int, offload: bool, family: str = "random") -> Mode:
    """One mode; sizes up to ``scale``. Families: ``random``, ``anti`` (keeping saves time, with noise), ``tied``
    (keeping saves time byte for nanosecond: many near ties), ``zero`` (most sizes are 0)."""

    def draw(part: float = 1.0) -> int:
        return rng.randint(0, int(scale * part))

    kept = draw()
    extra = {"random": draw, "anti": lambda: scale - kept + draw(0.1), "tied": lambda: scale - kept, "zero": draw}[
        family
    ]()
    if family == "zero":
        kept, extra = kept * rng.randint(0, 1), extra * rng.randint(0, 1)
    offloaded = draw() * rng.randint(0, 1) if offload else 0
    if offloaded:  # or nobody would choose it
        kept, extra = kept // 4, extra // 3
    workspace = draw(rng.choice([0, 0.3, 3]))
    return Mode(
        kept,
        kept + offloaded + draw(rng.choice([0, 0.3, 3])),
        offloaded + workspace,
        extra,
        offloaded,
        draw(),
        draw(),
    )


def random_blocks(
    rng: random.Random, count: int, modes: int, scale: int, offload: bool, family: str = "random"
) -> Blocks:
    """Blocks of up to ``modes`` modes, each with one that offloads nothing; some chains repeat blocks."""

    def block() -> list[Mode]:
        drawn = [
            random_mode(rng, scale, offload, family)
            for _ in range(rng.choice([1, rng.randint(1, modes), modes, modes]))
        ]
        if all(mode.offloaded for mode in drawn):
            drawn[rng.randrange(len(drawn))] = random_mode(rng, scale, False, family)
        return drawn

    kinds = [block() for _ in range(rng.choice([1, 2, count, count]))]
    return sorted((rng.choice(kinds) for _ in range(count)), key=kinds.index)
