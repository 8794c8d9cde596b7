"""Plans by budget: the gradient of full recomputation bit for bit, and a peak that was predicted and stays below.

Measured are live storages of the real chain on the CPU, what the prediction is about. It may be higher by 5 %, and by
one latent in float32, which these tiny networks see: it is counted beside a call from its begin to its end.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import tinyfamilies
import torch
from torch import Tensor

import prfl_fast
from prfl_fast.memory.trace import LiveBytes, storage_bytes
from prfl_fast.sampling import budgeting

pytest.importorskip("diffusers")

F32, BF16 = torch.float32, torch.bfloat16
FAMILIES = tinyfamilies.TEXT
Arguments = dict[str, Any]


class Problem:
    """A tiny network of a family with the arguments of one chain; ``lora``: only its adapters are trained."""

    def __init__(self, name: str, dtype: torch.dtype, lora: bool, **arguments: Any) -> None:
        twin = tinyfamilies.make(name, dtype)
        self.net: Any = twin.net
        if lora:
            pytest.importorskip("peft")
            tinyfamilies.add_lora(self.net)
            for key, parameter in self.net.named_parameters():
                parameter.requires_grad_("lora_" in key)
        self.arguments = {"conditioning": twin.conditioning, **arguments}
        if arguments.get("guidance_scale", 1.0) != 1.0:
            self.arguments["negative_conditioning"] = twin.negative_conditioning or {}
        self.latents, self.scheduler = twin.latents, twin.scheduler
        held = [self.latents, *self.net.parameters(), *self.net.buffers()]
        for texts in (self.arguments["conditioning"], self.arguments.get("negative_conditioning") or {}):
            held += [t for value in texts.values() for t in (value if isinstance(value, tuple) else (value,))]
        self.resident = sum(
            {t.untyped_storage()._cdata: storage_bytes(t) for t in held if isinstance(t, Tensor)}.values()
        )

    def sample(self, **more: Any) -> prfl_fast.Sample:
        return prfl_fast.unrolled_sample(self.net, self.scheduler, self.latents, None, **self.arguments, **more)

    def gradients(self, **more: Any) -> tuple[list[Tensor | None], int]:
        """Gradients of all parameters, and the measured peak."""
        with LiveBytes() as live:
            sample = self.sample(**more)
            if self.arguments.get("graph") == "steps":
                sample.latents.grad = torch.ones_like(sample.latents)
                sample.backward()
            else:
                sample.latents.backward(torch.ones_like(sample.latents))
            del sample
        made = [p.grad for p in self.net.parameters()]
        self.net.zero_grad(set_to_none=True)
        return made, live.peak + self.resident

    def least(self) -> int:
        with pytest.raises(prfl_fast.InfeasibleBudget) as caught:
            self.sample(memory_budget=1)
        return caught.value.least_bytes


def same(made: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    pairs = list(zip(made, expected, strict=True))
    return all(e is None if a is None else e is not None and torch.equal(a, e) for a, e in pairs)


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain's moments do not depend on the budget: each is traced once in a test."""
    plain, known = budgeting._traced, {}

    def traced(request: Any, graph: str, keep_last_call: bool) -> Any:
        if keep_last_call not in known:
            known[keep_last_call] = plain(request, graph, keep_last_call)
        return known[keep_last_call]

    monkeypatch.setattr(budgeting, "_traced", traced)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_budget(
    name: str, dtype: torch.dtype, lora: bool, traced_once: None, pytestconfig: pytest.Config
) -> None:
    problem = Problem(name, dtype, lora)
    expected, most = problem.gradients(plan=prfl_fast.MemoryPlan("blocks"))
    most = max(most, problem.gradients(plan=prfl_fast.MemoryPlan("call"))[1])
    least = problem.least()
    generator = random.Random(7)
    count = 30 if pytestconfig.getoption("--full") else 2
    for budget in (least, *(generator.randint(least, max(least, most)) for _ in range(count))):
        plan = problem.sample(memory_budget=budget).plan
        made, measured = problem.gradients(plan=plan)
        assert same(made, expected)
        assert measured <= budget
        assert plan.predicted_peak_bytes is not None
        assert measured <= plan.predicted_peak_bytes <= budget
        assert plan.predicted_peak_bytes <= 1.05 * measured + storage_bytes(problem.latents), plan
    with pytest.raises(prfl_fast.InfeasibleBudget):
        problem.sample(memory_budget=least - 1)
