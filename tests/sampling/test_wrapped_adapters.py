"""peft's adapters: several at once, DoRA, peft's own wrapper; changing them between sample and backward is noticed.

The bound is that of test_real_models.py: the plain loop's distance to float64 is what one such computation is off, and
two of them are at most twice that apart. Through ``scheduler.step`` and in one graph the operations are the loop's own:
not one bit differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from familyloop import Case

import prfl_fast

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_v", "ffn.net.0.proj"]
ROUNDINGS = 30  # of test_real_models.py


def with_adapters(names: tuple[str, ...] = ("a", "b"), *, scale: float | None = 0.5, **config: Any) -> Case:
    """Random adapters of rank 2, 3, ... on attention and feed-forward, weighted against each other; all trainable."""
    case = Case("wan", torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for rank, name in enumerate(names, 2):
            lora = peft.LoraConfig(r=rank, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False, **config)
            case.net.add_adapter(lora, adapter_name=name)
    case.net.set_adapters(list(names), [0.7, 1.3][: len(names)])
    case.net.requires_grad_(True)
    if scale is not None:
        case.conditioning["attention_kwargs"] = {"scale": scale}
    return case


def inside_peft_model() -> Case:
    case = Case("wan", torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        case.net = peft.get_peft_model(case.net, config)
    return case


def check(make: Callable[[], Case], graph: str, solver: str, groups: set[str], plain: Any = Case.plain) -> None:
    """Chain against plain loop, see the module's text."""
    expected, truth = plain(make()), make().float64().plain()
    actual = make().chain(graph=graph, solver=solver)
    assert actual.keys() == groups
    for group, value in expected.items():
        noise = float((value - truth[group]).norm())
        assert 0 < noise <= ROUNDINGS * 2.0**-24 * float(value.norm()), group
        assert float((actual[group] - value).norm()) <= 2 * noise, group
        if (graph, solver) == ("chain", "scheduler"):
            assert torch.equal(actual[group], value), group


@pytest.mark.parametrize(("graph", "solver"), [("chain", "scheduler"), ("steps", "table")])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_several_adapters_at_a_scale(names: tuple[str, ...], dora: bool, graph: str, solver: str) -> None:
    check(lambda: with_adapters(names, use_dora=dora), graph, solver, {"latents", "text", "weights", "lora"})


@pytest.mark.parametrize(("graph", "solver"), [("chain", "scheduler"), ("steps", "table")])
def test_one_adapter_of_two_is_active(graph: str, solver: str) -> None:
    def make() -> Case:
        case = with_adapters(scale=None)
        case.net.set_adapters("b", 0.4)
        case.net.requires_grad_(True)
        return case

    check(make, graph, solver, {"latents", "text", "weights", "lora"})
    case = make()
    case.backward(graph=graph, solver=solver)
    touched = {name: p.grad is not None for name, p in case.net.named_parameters() if "lora_" in name}
    assert touched and all(has == (".b." in name) for name, has in touched.items())


@pytest.mark.parametrize(("graph", "solver"), [("chain", "scheduler"), ("steps", "table")])
def test_inside_pefts_own_model(graph: str, solver: str) -> None:
    """The plain loop calls the wrapped network itself; only LoRA is trainable there."""

    def plain(case: Case) -> dict[str, torch.Tensor]:
        case.net = case.net.get_base_model()
        return case.plain()

    def make() -> Case:
        case = inside_peft_model()
        case.float64 = lambda: _unwrapped(case).float64()  # type: ignore[method-assign]
        return case

    check(make, graph, solver, {"latents", "text", "lora"}, plain)


def _unwrapped(case: Case) -> Case:
    del case.float64
    case.net = case.net.get_base_model()
    return case


def _replace(net: Any) -> None:
    net.proj_out.weight = torch.nn.Parameter(net.proj_out.weight.detach().clone())


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "switched": (lambda net: net.set_adapter("a"), "frozen or unfrozen|active adapters"),
    "switched, all trainable": (lambda net: _alone(net, net.set_adapter, "a"), "LoRA scaling or active adapters"),
    "weighted": (lambda net: net.set_adapters(["a", "b"], [0.7, 1.2]), "LoRA scaling or active adapters"),
    "disabled": (lambda net: net.disable_adapters(), "was frozen or unfrozen"),
    "disabled, all trainable": (lambda net: _alone(net, net.disable_adapters), "LoRA scaling or active adapters"),
    "no parameter": (lambda net: _replace_dropout(net), "module 'blocks.0.ffn.net.1' was added, removed or replaced"),
    "deleted": (lambda net: net.delete_adapters("a"), "added, removed or replaced"),
    "merged": (lambda net: net.fuse_lora(), "LoRA scaling or active adapters"),
    "a third": (lambda net: _third(net, TARGETS), "added, removed or replaced"),
    "elsewhere": (lambda net: _third(net, ["to_k"]), "added, removed or replaced"),
    "replaced": (_replace, "parameter 'proj_out.weight' was added, removed or replaced"),
    "cast": (lambda net: net.blocks[0].attn1.to_k.to(torch.bfloat16), "was torch.float32 and is torch.bfloat16"),
    "optimizer": (lambda net: torch.optim.SGD(_with_gradients(net), 1e-3).step(), "was written to"),
}


def _alone(net: Any, do: Callable[..., None], *arguments: str) -> None:
    """Without the freezing that peft does along with it."""
    do(*arguments)
    net.requires_grad_(True)


def _replace_dropout(net: Any) -> None:
    assert isinstance(net.blocks[0].ffn.net[1], torch.nn.Dropout)
    net.blocks[0].ffn.net[1] = torch.nn.Identity()


def _third(net: Any, targets: list[str]) -> None:
    requires = {name: p.requires_grad for name, p in net.named_parameters()}
    net.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name="c")
    # What peft freezes on the way would be noticed too; here only the new part is to be.
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(requires.get(name.replace(".base_layer", ""), requires.get(name, True)))


def _with_gradients(net: Any) -> list[torch.nn.Parameter]:
    parameters = [p for n, p in net.named_parameters() if "lora_A" in n]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("change", CHANGES)
def test_adapters_that_change_between_sample_and_backward(change: str, graph: str) -> None:
    case = with_adapters(scale=None)
    do, text = CHANGES[change]
    sample = case.sample(graph=graph, gradient="last:2", guidance_scale=1.0)
    loss = case.loss(sample.latents)
    do(case.net)
    before = [p.grad for p in case.net.parameters()]
    with pytest.raises(prfl_fast.ModelChangedError, match=text):
        loss.backward()
        sample.backward()
    assert all(p.grad is g for p, g in zip(case.net.parameters(), before, strict=True))


def test_a_switch_back_is_no_change() -> None:
    case = with_adapters()
    expected = case.chain()
    sample = case.sample()
    loss = case.loss(sample.latents)
    with torch.no_grad():
        case.net.disable_adapters()
        case.sample(gradient="none")  # a reference model, as in KL terms
        case.net.enable_adapters()
    case.net.requires_grad_(True)
    loss.backward()
    assert all(torch.equal(value, expected[group]) for group, value in case.gradients().items())
