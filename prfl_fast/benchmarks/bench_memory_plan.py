"""The memory plan of published models on named devices: predicted time, beside simpler plans; what does not fit.

Nothing is run: bytes are counted on fake tensors, nanoseconds are roofline estimates of the named device. One sample, a
full chain of 40 guided steps, AdamW, a latent reward of 8 blocks, a reserve of 2 GiB; the budget is all of the device.
Every plan, the simpler ones too, may keep the last call's graph where that fits.

- ``full_recompute``: every block keeps its input alone.
- ``uniform``: the best single keep-set for all blocks.
- ``greedy``: from the leanest plan on, the change of one block that saves most time per further byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prfl_fast import InfeasibleBudget
from prfl_fast.benchmarks.registry import Row, Setting
from prfl_fast.memory.keeps import LABELS, NOTHING, unions
from prfl_fast.memory.outlook import Choose, Iteration, Link, least_bytes, most_bytes, plan_iteration, same_for_all
from prfl_fast.memory.roofline import Device, device_named
from prfl_fast.memory.solver.problem import Step
from prfl_fast.memory.solver.simple import Ascent
from prfl_fast.sampling.planning import forecast

CASES = (("wan2.1-t2v-14b", "1280x720x81"), ("wan2.1-t2v-14b", "832x480x81"), ("wan2.1-t2v-1.3b", "832x480x81"))
DEVICES = ("rtx4090", "h100", "h200")  # 24, 80 and 141 GB
RANK = 32
TINY_CASES = (("wan2.1-t2v-1.3b", "64x64x5"),)


def greedy(link: Link, room: int) -> tuple[int, ...]:
    """The greedy choice for one chain. Raises InfeasibleBudget where even the leanest modes don't fit."""
    chain = [
        [
            Step(
                m.kept,
                max(m.forward_peak, m.kept + m.backward_transient),
                m.extra_ns,
                0,
                0,
                m.forward_ns,
                m.backward_ns,
            )
            for m in block
        ]
        for block in link.modes
    ]
    leanest = [min(range(len(block)), key=lambda m: (block[m].kept, block[m].peak, m)) for block in chain]
    ascent = Ascent(chain, room, 0, leanest)
    if not ascent.fits:
        raise InfeasibleBudget(room, ascent.peak[0])
    while ascent.step():
        pass
    return tuple(ascent.choice)


def seconds(iteration: Iteration, budget: int, device: Device, choose: Choose) -> float | None:
    """Predicted seconds of the iteration under a rule; None: it finds no plan within the budget."""
    try:
        return plan_iteration(iteration, budget, device, choose).total_ns / 1e9
    except InfeasibleBudget:
        return None


def compare(iteration: Iteration, device: Device) -> dict[str, Any]:
    """The plans of one iteration on one device."""
    budget, least = device.memory, least_bytes(iteration, device)
    told: dict[str, Any] = {
        "device": device.name,
        "memory_bytes": budget,
        "held_bytes": dict(iteration.held),
        "least_bytes": least,
        "most_bytes": most_bytes(iteration, device),
        "fits": least <= budget,
    }
    if least > budget:
        return told | {"short_by_bytes": least - budget}
    plan = plan_iteration(iteration, budget, device)
    if plan.peak_bytes > budget:
        return told | {"wrong": f"the plan needs {plan.peak_bytes} bytes"}
    rules = {name: same_for_all(name) for name in ("all", *unions(LABELS))}
    uniform = [s for choose in rules.values() if (s := seconds(iteration, budget, device, choose)) is not None]
    return told | {
        "peak_bytes": plan.peak_bytes,
        "keeps_last_call": plan.keep_last_call,
        "seconds": plan.total_ns / 1e9,
        "full_recompute_seconds": seconds(iteration, budget, device, rules[NOTHING]),
        "uniform_seconds": min(uniform, default=None),
        "greedy_seconds": seconds(iteration, budget, device, greedy),
    }


def details(setting: Setting) -> dict[str, Any]:
    """What stands above the rows."""
    return {
        "steps": 40,
        "gradient": "full",
        "guidance": "both branches differentiated",
        "batch": 1,
        "dtype": "bfloat16, what diffusers keeps in float32 in float32",
        "optimizer": "adamw",
        "reward_blocks": 8,
        "reserve_bytes": 2 * 2**30,
        "lora_rank": RANK,
        "times": {name: device_named(name).source for name in DEVICES},
    }


def rows(setting: Setting) -> Iterator[Row]:
    """One row per model, size, what is trained, and device."""
    for model, size in TINY_CASES if setting.tiny else CASES:
        for trained, lora in (("lora", RANK),) if setting.tiny else (("lora", RANK), ("full", None)):
            found = forecast(model, size, lora=lora, reward_blocks=1 if setting.tiny else 8)
            for name in DEVICES[-1:] if setting.tiny else DEVICES:
                told = {"model": model, "size": size, "trained": trained}
                yield told | compare(found.iteration, device_named(name))
