"""The planner: time, memory and gap on one core, and what it gains over greedy and over one mode for all blocks.

Every chain gets a budget between the least that holds it and what keeping everything takes. No time is reported for a
plan that exceeds its budget or that adds another time than it says.

Families: ``random``; ``anti`` (keeping saves time, with noise); ``wan`` (equal blocks: keep-sets from the input alone
to everything, in units of one 14B block's stream at 720p); ``wan-varied`` (each block up to 10 % off); ``wan-host`` and
``wan-varied-host`` (half of the modes offload what they keep, and the host holds 15 % of that). Hard ones: ``strong``
and ``subset`` (time saved is bytes kept, with and without a constant, drawn from 10^9 integers).
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.memory import InfeasibleBudget, Mode, solve_chain
from prfl_fast.memory.solver import chain as door

Blocks = list[list[Mode]]

LINK = 55 * 10**9  # bytes per second of a PCIe 5 link in one direction, as published
FRACTIONS = (0.05, 0.15, 0.3, 0.5, 0.7, 0.9)  # of the way from the least budget to keeping everything
# Family -> sizes (blocks, modes).
EASY = {
    "random": [(40, 50), (60, 8)],
    "anti": [(40, 50), (60, 8)],
    "wan": [(40, 50), (60, 8)],
    "wan-varied": [(40, 50), (60, 8)],
}
HOST = {"wan-host": [(40, 16), (60, 8)], "wan-varied-host": [(40, 16), (60, 8)]}
HARD = {"strong": [(40, 50), (60, 8)], "subset": [(40, 50), (60, 8)]}
SIZES = EASY | HOST | HARD
TINY = {"wan": [(40, 50)]}
CHAINS = 5  # per family and size, each with six budgets
SECONDS = {(40, 50): 1.0, (60, 8): 0.25}  # to stay below, in families that are not hard
HARD_SECONDS, HARD_MEGABYTES = 1.0, 100


def draw_block(rng: random.Random, family: str, modes: int) -> list[Mode]:
    """Modes of one block."""
    scale = 10**9
    block = []
    for m in range(modes):
        if family.startswith("wan"):
            host = family.endswith("host")
            levels = modes // 2 if host else modes
            level = m % levels / (levels - 1)  # 0: keeps its input, 1: keeps everything
            unit = 774e6 * (rng.uniform(0.9, 1.1) if "varied" in family else 1)
            kept, transient = int((1 + 21 * level) * unit), int((31 - 24 * level) * unit)
            extra = int(250e6 * (1 - level) ** 1.3 * unit / 774e6)
            if host and m >= levels:
                block.append(Mode(0, kept + transient, kept + transient, extra, kept, 230_000_000, 460_000_000))
            else:
                block.append(Mode(kept, kept + transient, transient, extra, 0, 230_000_000, 460_000_000))
        elif family == "random":
            kept = rng.randint(0, scale)
            block.append(Mode(kept, kept + rng.randint(0, scale), rng.randint(0, scale), rng.randint(0, scale)))
        else:
            kept = rng.randint(scale // 20, scale)
            transient = {"anti": (scale - kept) // 2, "strong": scale // 10, "subset": 0}[family]
            noise = {"anti": rng.randint(0, scale // 10), "strong": scale // 10, "subset": 0}[family]
            block.append(Mode(kept, kept, transient, scale - kept + noise))
    return block


def draw_chain(rng: random.Random, family: str, blocks: int, modes: int) -> Blocks:
    """All blocks."""
    if family in ("wan", "wan-host"):
        return [draw_block(rng, family, modes)] * blocks
    return [draw_block(rng, family, modes) for _ in range(blocks)]


def stall(mode: Mode, compute_ns: int) -> int:
    """Nanoseconds that the copy of what a block offloads takes longer than ``compute_ns``."""
    return max(0, -(-mode.offloaded * 10**9 // LINK) - compute_ns)


def judge(blocks: Blocks, choice: Sequence[int]) -> tuple[int, int, int]:
    """Peak, added time and host bytes of a plan, by the formulas."""
    modes = [block[m] for block, m in zip(blocks, choice, strict=True)]
    kept = peak = added = 0
    before = None
    for mode in modes:
        copied = before.offloaded if before else 0
        peak = max(peak, kept + copied + max(mode.forward_peak, mode.kept + mode.backward_transient))
        added += mode.extra_ns
        if before:
            added += stall(before, mode.forward_ns) + stall(before, mode.backward_ns + mode.extra_ns)
        kept += mode.kept
        before = mode
    return peak, added + 2 * stall(modes[-1], 0), sum(mode.offloaded for mode in modes)


def greedy(blocks: Blocks, budget: int, host: int) -> int | None:
    """Added time when blocks leave their smallest mode one by one, by time saved per byte; None: it does not fit."""
    choice = [min(range(len(b)), key=lambda m: (b[m].kept + b[m].offloaded, b[m].forward_peak, m)) for b in blocks]
    peak, added, used = judge(blocks, choice)
    if peak > budget or used > host:
        return None
    while True:
        offers = []
        for i, block in enumerate(blocks):
            now = block[choice[i]]
            for m, mode in enumerate(block):
                saved = now.extra_ns - mode.extra_ns
                if saved > 0:
                    more = mode.kept - now.kept + mode.offloaded - now.offloaded
                    offers.append((saved / max(1, more), i, m))
        for _, i, m in sorted(offers, reverse=True):
            changed = [*choice[:i], m, *choice[i + 1 :]]
            peak, after, used = judge(blocks, changed)
            if peak <= budget and used <= host and after < added:
                choice, added = changed, after
                break
        else:
            return added


def uniform(blocks: Blocks, budget: int, host: int) -> int | None:
    """Added time of the best single mode for all blocks; None: no mode fits."""
    fitting = []
    for m in range(len(blocks[0])):
        peak, added, used = judge(blocks, [m] * len(blocks))
        if peak <= budget and used <= host:
            fitting.append(added)
    return min(fitting, default=None)


def megabytes(field: str) -> float:
    """``VmRSS``, what this process holds now, or ``VmHWM``, the most that it held. (``getrusage`` would count what the
    parent held before the child was its own.)"""
    for told in Path("/proc/self/status").read_text().splitlines():
        if told.startswith(field):
            return int(told.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")


def measure(family: str, size: tuple[int, int], chains: int, peers: bool) -> dict[str, Any]:
    """One row: all chains of a family and size, each with one budget per fraction."""
    told: dict[str, Any] = {"family": family, "blocks": size[0], "modes": size[1], "solves": 0, "optimal": 0}
    seconds, walls, gaps, over_greedy, over_uniform = [], [], [], [], []
    no_greedy = no_uniform = 0
    door._native()
    before = megabytes("VmRSS")
    for seed in range(chains):
        blocks = draw_chain(random.Random(f"{family} {size} {seed}"), family, *size)
        host = sum(max(mode.offloaded for mode in block) for block in blocks) * 15 // 100
        options: dict[str, Any] = {"host_bytes": host, "bytes_per_second": LINK if host else None}
        try:
            solve_chain(blocks, 0, **options)
            least = 0
        except InfeasibleBudget as error:
            least = error.least_bytes
        fastest = [min(range(size[1]), key=lambda m: (b[m].extra_ns, b[m].offloaded, m)) for b in blocks]
        most = judge(blocks, fastest)[0]
        for fraction in FRACTIONS:
            budget = least + max(0, int((most - least) * fraction))
            start, wall = time.process_time(), time.perf_counter()
            plan = solve_chain(blocks, budget, **options)
            seconds.append(time.process_time() - start)
            walls.append(time.perf_counter() - wall)
            if judge(blocks, plan.choice) != (plan.peak_bytes, plan.extra_ns, plan.offloaded_bytes):
                return told | {"wrong": f"seed {seed}, budget {budget}: the plan is not what it says"}
            if plan.peak_bytes > budget or plan.offloaded_bytes > host:
                return told | {"wrong": f"seed {seed}, budget {budget}: the plan exceeds it"}
            told["solves"] += 1
            told["optimal"] += plan.optimal
            gaps.append(plan.gap)
            if peers and plan.extra_ns:
                other = greedy(blocks, budget, host)
                over_greedy += [] if other is None else [other / plan.extra_ns]
                no_greedy += other is None
                if family.startswith("wan"):
                    other = uniform(blocks, budget, host)
                    over_uniform += [] if other is None else [other / plan.extra_ns]
                    no_uniform += other is None
    # Processor time: what one core needs. Beside it the wall clock, longer where other programs share the machine.
    told["seconds_median"], told["seconds_max"] = statistics.median(seconds), max(seconds)
    told["wall_seconds_median"], told["wall_seconds_max"] = statistics.median(walls), max(walls)
    # The high-water mark of a process of its own, above what it held before the first solve.
    told["megabytes"] = max(0.0, megabytes("VmHWM") - before)
    told["gap_median"], told["gap_max"] = statistics.median(gaps), max(gaps)
    if peers:
        told["greedy"] = ratios(over_greedy, no_greedy)
        told["uniform"] = ratios(over_uniform, no_uniform) if family.startswith("wan") else None
    limit = HARD_SECONDS if family in HARD or family in HOST else SECONDS[size]
    told["seconds_limit"] = limit
    told["within_limits"] = told["seconds_max"] < limit and told["megabytes"] < HARD_MEGABYTES
    return told


def ratios(values: list[float], none: int) -> dict[str, Any]:
    """Added time over the planner's: median and extremes, and how often there was no plan at all."""
    if not values:
        return {"without_plan": none}
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "without_plan": none}


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {"engine": "python" if door._native() is None else "native", "chains": 1 if setting.tiny else CHAINS}


def rows(setting: Setting) -> Iterator[Row]:
    """One row per family and size."""
    sizes = TINY if setting.tiny else SIZES
    work = [(family, size, 1 if setting.tiny else CHAINS, True) for family in sizes for size in sizes[family]]
    # A process per row, so that each has its own high-water mark of memory.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        yield from pool.imap(_measure, work)


def _measure(work: tuple[str, tuple[int, int], int, bool]) -> Row:
    return measure(*work)
