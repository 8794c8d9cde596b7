"""Tiny networks of the four families, with LoRA at a scale of 0.5, through the chain against the plain loop.

The bound. Plain loop and chain are two computations of one number in the same dtype; the distance of the plain loop to
the same loop in float64 (network, latents and text upcast after their rounding) tells how far such a computation goes
astray. Two of them are at most twice that apart, if the chain's own is no larger. A wrong scale, a lost branch or a
lost step is of order 1; that float64 distance is held under 2^-24 or 2^-8 times the number of roundings in a row,
so the bound stays far below that.
"""

from __future__ import annotations

import copy
from typing import Any

import familyloop
import pytest
import tinyfamilies
import torch
from familyloop import Case

pytest.importorskip("diffusers")
pytest.importorskip("peft")

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
# Some 12 roundings in a row in a block and as many around the blocks, in 2 blocks, 3 steps and twice (forward and
# backward) are 216; they add up as a random walk does, to 15, and the network's condition is left as much again.
ROUNDINGS = 30
FORMS = [("table", "chain"), ("table", "steps"), ("scheduler", "chain"), ("scheduler", "steps")]


def check(actual: dict[str, torch.Tensor], name: str, dtype: torch.dtype) -> None:
    plain, noise = familyloop.reference(name, dtype, True)
    assert actual.keys() == plain.keys() == {"latents", "text", "weights", "lora"}
    for group, expected in plain.items():
        assert 0 < noise[group] <= ROUNDINGS * UNIT[dtype] * float(expected.norm()), group
        assert float((actual[group] - expected).norm()) <= 2 * noise[group], group


@pytest.mark.parametrize(("solver", "graph"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tinyfamilies.TEXT)
def test_family_with_lora_scale(name: str, dtype: torch.dtype, solver: str, graph: str) -> None:
    case = Case(name, dtype, lora=True)
    actual = case.chain(solver=solver, graph=graph)
    check(actual, name, dtype)
    if (solver, graph) == ("scheduler", "chain"):
        # The same operations in the same order, recomputed: not one bit differs.
        plain, _ = familyloop.reference(name, dtype, True)
        assert all(torch.equal(actual[group], plain[group]) for group in plain)


@pytest.mark.parametrize("plan", ["call", "blocks"])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_a_model_that_checkpoints_itself_keeps_the_lora_scale(graph: str, plan: str) -> None:
    """diffusers undoes the scale before its checkpointed blocks run again: the plain loop itself is wrong by then."""
    from prfl_fast.memory.plan import MemoryPlan

    case = Case("wan", torch.float32, lora=True)
    case.net.enable_gradient_checkpointing()
    check(case.chain(graph=graph, plan=MemoryPlan(plan, True)), "wan", torch.float32)
    assert case.net.is_gradient_checkpointing
    plain, noise = familyloop.reference("wan", torch.float32, True)
    assert float((case.plain()["lora"] - plain["lora"]).norm()) > 1e3 * noise["lora"], "no trap any more"


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_a_model_that_checkpoints_itself_by_its_own_function(graph: str) -> None:
    """Without a scale its own way of checkpointing is left to it."""
    case = Case("wan", torch.float32)
    expected = case.chain(graph=graph)
    seen: list[str] = []

    def own(block: Any, *args: Any) -> Any:
        seen.append(type(block).__name__)
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    case.net.enable_gradient_checkpointing(own)
    actual = case.chain(graph=graph)
    assert all(torch.equal(actual[group], expected[group]) for group in expected)
    # Two blocks in 6 calls, 5 of them recomputed.
    assert len(seen) == 2 * (2 * 6 - 1)


@pytest.mark.parametrize("scale", [0.1, 0.0])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_scales_come_back_to_the_last_bit(graph: str, scale: float) -> None:
    """diffusers multiplies and divides (3 * 0.1 / 0.1 is not 3), and forgets the scaling of a scale of 0."""
    case = Case("wan", torch.float32, lora=True)
    layers = [m for m in case.net.modules() if isinstance(getattr(m, "scaling", None), dict)]
    for layer in layers:
        layer.scaling["default"] = 3.0
    case.conditioning["attention_kwargs"] = {"scale": scale}
    actual = case.chain(graph=graph)
    assert [layer.scaling for layer in layers] == [{"default": 3.0}] * len(layers)
    assert bool(actual["lora"].any()) == (scale != 0)
    assert all(torch.equal(a, b) for a, b in zip(actual.values(), case.chain(graph=graph).values(), strict=True))


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_lora_alone_is_trained_and_accumulates(graph: str) -> None:
    """Everything but LoRA frozen; two backwards add up in their own tensors (a doubling rounds nothing)."""
    case = Case("wan", torch.float32, lora=True)
    for key, parameter in case.net.named_parameters():
        parameter.requires_grad_("lora_" in key)
    plain, noise = familyloop.reference("wan", torch.float32, True)
    case.backward(graph=graph)
    first = [t.grad for t in case.leaves()["lora"]]
    case.backward(graph=graph)
    assert all(t.grad is g for t, g in zip(case.leaves()["lora"], first, strict=True))
    assert all(p.grad is None for p in case.net.parameters() if not p.requires_grad)
    twice = case.gradients()["lora"]
    assert float((twice / 2 - plain["lora"]).norm()) <= 2 * noise["lora"]


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_frozen_blocks_pass_the_gradient_on(graph: str) -> None:
    case = Case("ltx", torch.float32, lora=True)
    case.net.transformer_blocks[1].requires_grad_(False)
    plain, noise = familyloop.reference("ltx", torch.float32, True)
    actual = case.chain(graph=graph)
    for group in ("latents", "text"):
        assert float((actual[group] - plain[group]).norm()) <= 2 * noise[group]
    assert all(p.grad is None for p in case.net.transformer_blocks[1].parameters())


def test_batch_of_one_and_three_and_latents_that_are_not_contiguous() -> None:
    for batch in (1, 3):
        case = Case("wan", torch.float32, batch=batch)
        expected = case.chain(solver="scheduler")
        strided = copy.copy(case)
        inner = case.latents.detach().movedim(1, -1).contiguous().movedim(-1, 1)
        strided.latents = inner.requires_grad_()
        assert not strided.latents.is_contiguous()
        actual = strided.chain(solver="scheduler")
        plain = case.plain()
        # One set of numbers in another layout: kernels may sum in another order, a few units of rounding.
        for group in expected:
            assert torch.equal(expected[group], plain[group])
            assert familyloop.error(actual[group], plain[group]) <= ROUNDINGS * UNIT[torch.float32]
