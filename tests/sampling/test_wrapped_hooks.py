"""Blocks compiled one by one, diffusers' hooks, accelerate, quantised weights: the plain loop's bits, or refused.

Through ``scheduler.step`` and in one graph the chain's operations are the loop's own, recomputed: not one bit may
differ. A table and a backward per step sum in another order; their bound is that of test_real_models.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import familyloop
import plainloop
import pytest
import torch
from familyloop import Case
from torch import Tensor, nn

import prfl_fast
from prfl_fast.memory.plan import MemoryPlan

pytest.importorskip("diffusers")
pytest.importorskip("peft")

Wrap = Callable[[Any], Any]
CPU = torch.device("cpu")


def only_lora(net: Any) -> None:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)


def cast(net: Any) -> None:
    only_lora(net)
    # All that Wan does not keep itself, its last layer too.
    net.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, skip_modules_pattern=("norm", "lora_")
    )
    assert net.proj_out.weight.dtype == torch.float8_e4m3fn


def cast_and_checkpointed(net: Any) -> None:
    cast(net)
    net.enable_gradient_checkpointing()


def by_block(net: Any) -> None:
    net.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)


def by_leaf(net: Any) -> None:
    net.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


def by_leaf_and_checkpointed(net: Any) -> None:
    by_leaf(net)
    net.enable_gradient_checkpointing()


def compiled_blocks(net: Any) -> None:
    for block in net.blocks:
        block.compile(backend="eager")


def quantised(net: Any) -> None:
    """Frozen int8 weights with LoRA on top."""
    only_lora(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and "lora" not in name:
                setattr(module, name, Int8Linear(child))


class Int8Linear(nn.Module):
    """A parameter of integers and a scale per row, as the libraries for quantised weights keep them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight * self.scale).to(x.dtype), self.bias)


def make(wrap: Wrap, lora: bool) -> Case:
    case = Case("wan", torch.float32, lora=lora)
    if lora:
        case.conditioning.pop("attention_kwargs")
    wrap(case.net)
    return case


def dtypes(net: nn.Module) -> list[torch.dtype]:
    return [p.dtype for p in net.parameters()]


@pytest.mark.parametrize(
    ("wrap", "lora"),
    [
        (cast, True),
        (cast_and_checkpointed, True),
        (by_block, False),
        (by_block, True),
        (by_leaf, True),
        (by_leaf_and_checkpointed, True),
        (compiled_blocks, False),
        (quantised, True),
    ],
)
def test_wrapped_network_is_the_plain_loop(wrap: Wrap, lora: bool) -> None:
    expected = make(wrap, lora).plain()
    assert all(bool(value.any()) for value in expected.values())
    for graph in ("chain", "steps"):
        case = make(wrap, lora)
        before = dtypes(case.net)
        actual = case.chain(graph=graph, solver="scheduler" if graph == "chain" else "table")
        for group, value in expected.items():
            if graph == "chain":
                assert torch.equal(actual[group], value), group
            else:
                assert familyloop.error(actual[group], value) <= 60 * 2.0**-24, group
        # What a layer's weights are between two calls, they are again: a recomputation that stops early would leave
        # some in the compute dtype.
        assert dtypes(case.net) == before
    torch.compiler.reset()


class Shelf:
    """Which layers' weights are away from their place: in the compute dtype, or onloaded."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.dtypes = net, dtypes(net)
        self.onloaded: set[int] = set()
        for module in net.modules():
            hook = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
            if hook is not None:
                self._note(hook.group)

    def _note(self, group: Any) -> None:
        onload, offload = group.onload_, group.offload_

        def on() -> None:
            self.onloaded.add(id(group))
            onload()

        def off() -> None:
            self.onloaded.discard(id(group))
            offload()

        group.onload_, group.offload_ = on, off

    def assert_tidy(self) -> None:
        assert dtypes(self.net) == self.dtypes
        assert not self.onloaded


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("wrap", [cast, cast_and_checkpointed, by_leaf, by_leaf_and_checkpointed])
def test_weights_are_back_in_their_place(wrap: Wrap, graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After recomputations, which need not run to their end, and when a call fails inside a layer."""
    case = make(wrap, True)
    expected = case.chain(graph=graph)
    shelf = Shelf(case.net)
    for group, value in case.chain(graph=graph).items():
        assert torch.equal(value, expected[group])
    shelf.assert_tidy()
    linear, runs, stop = nn.functional.linear, [0], [0]

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        runs[0] += 1
        if 0 < stop[0] <= runs[0] and (dtypes(case.net) != shelf.dtypes or shelf.onloaded):
            raise KeyboardInterrupt
        return linear(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "linear", counted)
    sample = case.sample(graph=graph)
    forward, runs[0] = runs[0], 0
    case.loss(sample.latents).backward()
    if graph == "steps":
        sample.backward()
    case.gradients()
    backward = runs[0]
    assert backward > forward / 2 > 50
    # The last layer of a call, which is hooked, and one amid; then the first in the backward.
    for place in (forward, forward // 2 - 3):
        runs[0], stop[0] = 0, place
        with pytest.raises(KeyboardInterrupt):
            case.sample(graph=graph)
        shelf.assert_tidy()
    stop[0] = 0
    sample = case.sample(graph=graph)
    runs[0], stop[0] = 0, 1
    with pytest.raises(KeyboardInterrupt):
        case.loss(sample.latents).backward()
        sample.backward()
    shelf.assert_tidy()
    stop[0] = 0
    again = case.chain(graph=graph)
    assert all(torch.equal(again[group], expected[group]) for group in expected)


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_weights_of_recomputed_blocks_are_back_too(graph: str) -> None:
    """The last thing that a block needs again is inside of its last layer, which is hooked: here the block itself."""
    hooks = pytest.importorskip("diffusers.hooks")
    problem = plainloop.Problem(seed=3, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0)
    problem.net.blocks.requires_grad_(False)
    hooks.apply_layerwise_casting(problem.net.blocks, torch.float32, torch.float64, skip_modules_pattern=())
    before = dtypes(problem.net)
    assert torch.float32 in before
    expected = problem.plain_gradients()
    actual = problem.chain_gradients(graph=graph, plan=MemoryPlan("blocks", True))
    assert dtypes(problem.net) == before
    plainloop.assert_same(actual, expected, 1e-10)


def test_layerwise_casting_of_trainable_weights_is_refused() -> None:
    """The reason: diffusers rounds what ``.grad`` holds to the storage dtype in every call."""
    case = Case("wan", torch.float32)
    case.net.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="'blocks.0.attn1.to_q.weight' is trainable under layerwise casting"):
        case.sample()
    case.sample(gradient="none")
    case.plain()
    weight = case.net.blocks[0].attn1.to_q.weight
    assert weight.grad is None
    case.loss(case.net(case.latents, torch.ones(2), case.text)[0]).backward()
    assert weight.grad.dtype == torch.float32
    case.sample(gradient="none")
    assert weight.grad.dtype == torch.bfloat16, "no trap any more"
    case.net.requires_grad_(False)
    case.backward()


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_blocks_compiled_by_inductor(graph: str) -> None:
    """float64: the compiler may contract and reorder, a few roundings in a chain of 1e3 operations."""
    if not _has_a_compiler():
        pytest.skip("no C++ compiler")
    problem = plainloop.Problem(seed=3, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0)
    expected = problem.plain_gradients()
    for block in problem.net.blocks:
        block.compile()
    plainloop.assert_same(problem.chain_gradients(graph=graph), expected, 1e-10)
    torch.compiler.reset()


def _has_a_compiler() -> bool:
    import shutil

    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_by_accelerate(precision: str) -> None:
    accelerate = pytest.importorskip("accelerate")

    def wrap(case: Case) -> Case:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        case.net = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(case.net)
        return case

    try:
        expected = wrap(Case("wan", torch.float32)).plain()
        actual = wrap(Case("wan", torch.float32)).chain(solver="scheduler")
        assert all(torch.equal(actual[group], expected[group]) for group in expected)
        swept = wrap(Case("wan", torch.float32)).chain(graph="steps", solver="scheduler")
        for group, value in expected.items():
            # One cast of a cotangent per step at another place, and another order of the sums.
            unit = 2.0**-8 if precision == "bf16" else 2.0**-24
            assert familyloop.error(swept[group], value) <= 2 * familyloop.STEPS * 10 * unit, group
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_wrappers_that_a_recomputation_breaks_are_refused() -> None:
    case = Case("wan", torch.float32)
    inner = case.net
    case.net = nn.DataParallel(inner)
    with pytest.raises(ValueError, match="transformer: nn.DataParallel copies the network anew"):
        case.sample()

    class FullyShardedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    case.net = torch.compile(FullyShardedDataParallel(inner), backend="eager")
    with pytest.raises(ValueError, match=r"transformer: FullyShardedDataParallel.*use torch.distributed.fsdp"):
        case.sample()


def test_torchs_own_quantised_layers_are_refused() -> None:
    """The reason: the gradient ends in them, in a plain loop too."""
    quantize_dynamic = getattr(pytest.importorskip("torch.ao.quantization"), "quantize_dynamic", None)
    if quantize_dynamic is None:
        pytest.skip("this torch has no quantised layers of its own")
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    broken = quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 4, requires_grad=True)
    broken(x).sum().backward()
    assert x.grad is None, "no trap any more"

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = broken
            self.last = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.last(self.inner(x))

    with pytest.raises(ValueError, match="transformer: 'inner.0' is a quantised layer of torch .*no derivative"):
        prfl_fast.unrolled_sample(Net(), plainloop.scheduler("euler"), torch.randn(2, 4), 2)
