"""recompute_blocks: the same bits as the plain call, whatever stands around it, and nothing left behind.

Recomputation does the same operations on the same values in the same order, and each gradient is summed in the order
of the plain graph; so every comparison is for equal bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import tinyfamilies
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from prfl_fast.memory.blocks import recompute_blocks
from prfl_fast.memory.trace import LiveBytes
from prfl_fast.models import adapter_for


class KeywordBlock(nn.Module):
    """Takes its stream by position and the rest by keyword, tensors inside a tuple and a dictionary among it."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        self.calls = 0

    def forward(self, x: Tensor, *, pair: tuple[Tensor, None], more: dict[str, Any], sign: float) -> dict[str, Tensor]:
        self.calls += 1
        hidden = torch.tanh(self.linear(x) * pair[0]) + sign * more["shift"]
        return {"x": x + self.drop(hidden)}


class KeywordNet(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KeywordBlock(7, dropout) for _ in range(3))
        self.fails_after = -1

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index == self.fails_after:
                raise KeyboardInterrupt
            x = block(x, pair=(scale, None), more={"shift": shift, "name": "any"}, sign=-0.5)["x"]
        return x


Call = Callable[[], Tensor]


def attributes(net: nn.Module) -> list[dict[str, Any]]:
    """Everything that hangs on the modules; the counts of calls may change."""
    return [{k: v for k, v in vars(m).items() if k != "calls"} for m in net.modules()]


def gradients_of(call: Call, leaves: list[Tensor]) -> list[Tensor | None]:
    torch.manual_seed(5)  # of dropout
    output = call()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    gradients = torch.autograd.grad((output.float() * weights).sum(), leaves, allow_unused=True)
    return [output.detach(), *gradients]


def assert_exact(
    net: nn.Module,
    blocks: list[nn.Module],
    call: Call,
    leaves: list[Tensor],
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """The context is left before the backward; alone and inside a checkpoint of the whole call."""

    def plain() -> Tensor:
        with around():
            return call()

    def recomputed() -> Tensor:
        with around(), recompute_blocks(net, blocks):
            return call()

    def whole_call() -> Tensor:
        def inner(_: Tensor) -> Tensor:
            with recompute_blocks(net, blocks):
                return call()

        # The checkpoint restores autocast itself, so it stands inside.
        with around():
            result: Tensor = checkpoint(inner, leaves[0], use_reentrant=False)
        return result

    before = attributes(net)
    expected = gradients_of(plain, leaves)
    tinyfamilies.assert_equal(gradients_of(recomputed, leaves), expected)
    tinyfamilies.assert_equal(gradients_of(whole_call, leaves), expected)
    assert attributes(net) == before


def family_problem(name: str, lora: bool = False) -> tuple[Any, list[nn.Module], Callable[..., Tensor], list[Any]]:
    twin = tinyfamilies.make(name)
    net: Any = twin.net
    if lora:
        tinyfamilies.add_lora(net)
    conditioning = tinyfamilies.leaves(twin.conditioning)
    x = twin.latents.clone().requires_grad_()
    leaves = [x, *(v for v in conditioning.values() if isinstance(v, Tensor) and v.requires_grad), *net.parameters()]

    def call(**more: Any) -> Tensor:
        return twin.call(x, torch.tensor(371.0), {**conditioning, **more})

    return net, [block for _, block in adapter_for(net).blocks()], call, leaves


@pytest.mark.parametrize("name", tinyfamilies.TEXT)
def test_families(name: str) -> None:
    pytest.importorskip("diffusers")
    net, blocks, call, leaves = family_problem(name)
    assert blocks
    assert_exact(net, blocks, call, leaves)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_lora_with_the_scale_of_one_call(scale: float) -> None:
    """diffusers sets the scale for the call alone; the recomputation comes later and must have it too."""
    pytest.importorskip("peft")
    net, blocks, call, leaves = family_problem("wan", lora=True)
    arguments = {} if scale == 1 else {"attention_kwargs": {"scale": scale}}
    assert_exact(net, blocks, lambda: call(**arguments), leaves)
    other = gradients_of(lambda: call(attention_kwargs={"scale": 0.5}), leaves)
    ours = gradients_of(lambda: call(**arguments), leaves)
    assert any(a is not None and b is not None and not torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_scalings_are_as_they_were_after_the_backward() -> None:
    pytest.importorskip("peft")
    net, blocks, call, leaves = family_problem("wan", lora=True)

    def scalings() -> list[Any]:
        return [dict(s) for s in (getattr(m, "scaling", None) for m in net.modules()) if isinstance(s, dict)]

    with recompute_blocks(net, blocks):
        output = call(attention_kwargs={"scale": 0.25})
    before = scalings()
    assert before and all(value == 1 for scaling in before for value in scaling.values())
    torch.autograd.grad(output.sum(), leaves, allow_unused=True)
    assert scalings() == before


def test_autocast_and_train_mode() -> None:
    pytest.importorskip("diffusers")
    net, blocks, call, leaves = family_problem("wan")
    assert_exact(net.train(), blocks, call, leaves, lambda: torch.autocast("cpu", dtype=torch.bfloat16))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("contiguous", [True, False])
def test_keywords_dropout_and_strided_input(dropout: float, contiguous: bool) -> None:
    net = KeywordNet(dropout)
    x = torch.randn(5, 3, 7).requires_grad_() if contiguous else torch.randn(7, 3, 5).requires_grad_().transpose(0, 2)
    scale, shift = torch.randn(3, 7, requires_grad=True), torch.randn(5, 1, 7, requires_grad=True)
    assert_exact(net, list(net.blocks), lambda: net(x, scale, shift), [x, scale, shift, *net.parameters()])


def test_dropout_of_the_recomputation_leaves_the_callers_random_state() -> None:
    net, inputs = KeywordNet(0.4), (torch.randn(2, 7), torch.ones(7), torch.ones(7))
    with recompute_blocks(net, list(net.blocks)):
        output = net(*inputs)
    state = torch.get_rng_state()
    output.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_every_block_runs_twice_and_its_own_hooks_once() -> None:
    net, inputs = KeywordNet(), (torch.randn(2, 7), torch.ones(7), torch.ones(7))
    hooked: list[nn.Module] = []
    handles = [block.register_forward_hook(lambda m, *_: hooked.append(m)) for block in net.blocks]
    blocks: Any = list(net.blocks)
    # The order does not matter, and a block listed twice is one.
    with recompute_blocks(net, [blocks[2], blocks[0], blocks[1], blocks[0]]):
        output = net(*inputs)
    assert [b.calls for b in blocks] == [1, 1, 1]
    output.sum().backward()
    assert [b.calls for b in blocks] == [2, 2, 2]
    assert hooked == blocks
    for handle in handles:
        handle.remove()


def test_without_gradients_nothing_is_recomputed_and_empty_lists_are_fine() -> None:
    net, inputs = KeywordNet(), (torch.randn(2, 7), torch.ones(7), torch.ones(7))
    blocks: Any = list(net.blocks)
    with torch.no_grad(), recompute_blocks(net, blocks):
        assert not net(*inputs).requires_grad
    with recompute_blocks(net, []):
        net(*inputs).sum().backward()
    assert [b.calls for b in blocks] == [2, 2, 2]


def test_a_block_keeps_its_inputs_only() -> None:
    """Between forward and backward: one stream [2, 300, 7] per block, and the result."""
    net, shift = KeywordNet(), torch.ones(7)
    x = torch.randn(2, 300, 7)
    stream = -(-x.numel() * 4 // 512) * 512
    for recompute, streams in ((True, 3), (False, 0)):
        with LiveBytes() as live:
            with recompute_blocks(net, list(net.blocks)) if recompute else nullcontext():
                output = net(x, shift, shift)
            kept = live.current
            output.sum().backward()
            del output
        # Random states (about 5 KB each) are saved beside them, one per block.
        state = -(-torch.get_rng_state().numel() // 512) * 512
        if recompute:
            assert streams * stream <= kept <= streams * (stream + state)
        else:
            assert kept > 5 * stream


def test_an_exception_leaves_nothing_behind() -> None:
    net, inputs = KeywordNet(), (torch.randn(2, 7), torch.ones(7), torch.ones(7))
    before = attributes(net)
    net.fails_after = 2
    with pytest.raises(KeyboardInterrupt), recompute_blocks(net, list(net.blocks)):
        net(*inputs)
    net.fails_after = -1
    assert [block.calls for block in net.blocks] == [1, 1, 0]
    assert attributes(net) == before
    with pytest.raises(TypeError), recompute_blocks(net, [net.blocks[0], None]):  # type: ignore[list-item]
        pass
    assert attributes(net) == before


def test_an_exception_in_the_recomputation_leaves_nothing_behind() -> None:
    net, inputs = KeywordNet(), (torch.randn(2, 7), torch.ones(7), torch.ones(7))
    with recompute_blocks(net, list(net.blocks)):
        output = net(*inputs)
    before = attributes(net)

    def fail(module: nn.Module, arguments: Any) -> None:
        raise KeyboardInterrupt

    handle = net.blocks[1].linear.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        output.sum().backward()
    handle.remove()
    assert [block.calls for block in net.blocks] == [1, 2, 2]
    assert attributes(net) == before


def test_forwards_of_an_instance_and_compiled_calls_are_kept() -> None:
    """Other tools replace ``forward`` in the instance, and Module.compile sets a call of its own."""
    net, inputs = KeywordNet(), (torch.randn(2, 7), torch.ones(7), torch.ones(7))
    block: Any = net.blocks[0]
    other: Any = net.blocks[1]
    calls = {"replaced": 0, "compiled": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    block.forward = replaced = counted("replaced", block.forward)
    other._compiled_call_impl = compiled = counted("compiled", other._call_impl)
    with recompute_blocks(net, [block, other]):
        net(*inputs).sum().backward()
    assert calls == {"replaced": 2, "compiled": 2}
    assert vars(block)["forward"] is replaced and vars(other)["_compiled_call_impl"] is compiled
    assert "forward" not in vars(other)


def test_the_models_own_checkpointing_rests_meanwhile() -> None:
    pytest.importorskip("diffusers")
    net, blocks, call, leaves = family_problem("wan")
    expected = gradients_of(call, leaves)
    runs = [0]
    handle: Any = blocks[0]
    handle = handle.ffn.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    network: Any = net
    network.train().enable_gradient_checkpointing()
    assert network.gradient_checkpointing is True
    with recompute_blocks(net, blocks):
        assert network.gradient_checkpointing is False
        output = call()
    assert network.gradient_checkpointing is True
    actual = gradients_of(lambda: output, leaves)
    assert runs[0] == 2
    handle.remove()
    tinyfamilies.assert_equal(actual, expected)
