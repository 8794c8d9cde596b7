"""Time that the chain itself takes per step: a trivial network on a tiny latent, its own time taken off.

Forward: one unrolled_sample of the full chain, its door included, minus as many bare calls of the network. Forward and
backward: minus 2 C - 1 bare calls and C bare backwards. The solver is cached, as it is from the second chain on; what
the first one pays is told apart. Aim: under 1 ms a step.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.benchmarks.registry import Row, Setting

STEPS, REPEATS = 40, 30
TINY_STEPS, TINY_REPEATS = 3, 1


class Trivial(nn.Module):
    """One product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.weight


def schedulers() -> dict[str, Any]:
    """A multistep one and Euler."""

    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return {
        "UniPCMultistepScheduler": diffusers.UniPCMultistepScheduler(**flow),
        "FlowMatchEulerDiscreteScheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


def milliseconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and least of single runs, after a warm-up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "minimum": min(times)}


def measure(scheduler: Any, solver: str, graph: str, steps: int, repeats: int) -> dict[str, Any]:
    """One row."""
    net, latents, t = Trivial(), torch.randn(1, 4, 2, 4, 4), torch.tensor(500.0)
    ones = torch.ones_like(latents)

    def forward() -> prfl_fast.Sample:
        return prfl_fast.unrolled_sample(net, scheduler, latents, steps, solver=solver, graph=graph)

    def both() -> None:
        sample = forward()
        sample.latents.backward(ones)
        if graph == "steps":
            sample.backward()

    def own_forward() -> None:
        for _ in range(steps):
            net(latents, t)

    def own_both() -> None:
        for _ in range(steps - 1):
            net(latents, t)
        for _ in range(steps):
            net(latents, t).backward(ones)

    row: dict[str, Any] = {"scheduler": type(scheduler).__name__, "solver": solver, "graph": graph}
    for name, whole, own in (("forward", forward, own_forward), ("forward_backward", both, own_both)):
        chain, network = milliseconds(whole, repeats), milliseconds(own, repeats)
        row[name] = {
            "overhead_ms_per_step": {k: round((chain[k] - network[k]) / steps, 4) for k in chain},
            "chain_ms": {k: round(v, 3) for k, v in chain.items()},
            "network_ms": {k: round(v, 3) for k, v in network.items()},
        }
    return row


def first_chain(scheduler: Any, solver: str, steps: int) -> float:
    """Milliseconds of the probe, which later chains of the same scheduler do not pay."""
    kinds: dict[str, Any] = {
        "table": prfl_fast.SolverTable.from_scheduler,
        "scheduler": lambda s, n: prfl_fast.unrolled_sample(
            Trivial(), s, torch.randn(1, 4, 2, 4, 4), n, solver="scheduler", gradient="none"
        ),
    }
    start = time.perf_counter()
    kinds[solver](scheduler, steps)
    return round(1e3 * (time.perf_counter() - start), 2)


def counts(setting: Setting) -> tuple[int, int]:
    """Steps and repeats."""
    return (TINY_STEPS, TINY_REPEATS) if setting.tiny else (STEPS, REPEATS)


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return dict(zip(("steps", "repeats"), counts(setting), strict=True))


def rows(setting: Setting) -> Iterator[Row]:
    """One row per scheduler, solver and form of the graph."""
    steps, repeats = counts(setting)
    for scheduler in list(schedulers().values())[: 1 if setting.tiny else None]:
        for solver in ("table", "scheduler"):
            probe = first_chain(scheduler, solver, steps)
            for graph in ("chain", "steps"):
                yield measure(scheduler, solver, graph, steps, repeats) | {"first_probe_ms": probe}
