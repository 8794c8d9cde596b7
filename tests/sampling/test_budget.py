"""Byte budgets: what is predicted on fake tensors is what the real chain needs, and never less."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import plainloop
import pytest
import tinyfamilies
import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.memory.pretend import UntraceableError
from prfl_fast.memory.trace import LiveBytes, storage_bytes

pytest.importorskip("diffusers")

CALLS: list[int] = []  # one entry per evaluation, on fake tensors too; what a module keeps itself is put back


class Pointwise(nn.Module):
    """net(x, t, c) with latents large beside the weights; ``trainable`` blocks from the end on."""

    def __init__(self, channels: int = 3, width: int = 8, trainable: int = 2, decides: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(channels + 1, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(width, channels)
        self.decides = decides
        for block in self.blocks[: 2 - trainable]:
            block.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        CALLS.append(1)
        dtype = self.last.weight.dtype
        tokens = x.to(dtype).movedim(1, -1)
        tokens = torch.cat([tokens, (t / 1000).to(dtype).expand(*tokens.shape[:-1], 1)], -1)
        h = self.first(tokens) + c[:, None, None, None, :]
        if self.decides and bool(h.sum() > 0):
            h = -h
        for block in self.blocks:
            h = h + block(h)
        return self.last(h).movedim(-1, 1)


class Case:
    """A network with its arguments; ``arguments`` go to unrolled_sample as they are."""

    def __init__(self, net: Any, latents: Tensor, names: tuple[str, str], scheduler: str = "unipc", **arguments: Any):
        self.net, self.latents, self.arguments = net, latents, arguments
        self.scheduler = plainloop.scheduler(scheduler)
        self.key, self.steps = names[0], arguments.pop("steps", 5)
        width = {"c": 8, "encoder_hidden_states": 16}[self.key]
        shape = (len(latents), width) if self.key == "c" else (len(latents), 7, width)
        dtype = next(net.parameters()).dtype
        self.texts = [torch.randn(shape).to(dtype) for _ in range(2)]

    def sample(self, **more: Any) -> prfl_fast.Sample:
        arguments = {"conditioning": {self.key: self.texts[0]}, **self.arguments, **more}
        if "guidance_scale" in arguments:
            arguments["negative_conditioning"] = {self.key: self.texts[1]}
        return prfl_fast.unrolled_sample(self.net, self.scheduler, self.latents, self.steps, **arguments)

    def backward(self, sample: prfl_fast.Sample) -> None:
        taps = [tap.latents for tap in sample.taps if tap.latents.requires_grad]
        if not taps:
            return
        if self.arguments.get("graph") == "steps":
            for latents in taps:
                latents.grad = torch.ones_like(latents)
            sample.backward()
        else:
            torch.autograd.backward(taps, [torch.ones_like(latents) for latents in taps])

    def modules(self) -> list[nn.Module]:
        return [m for m in (self.net, self.arguments.get("transformer_2")) if isinstance(m, nn.Module)]

    def measured(self, **more: Any) -> int:
        """Bytes that lived before and those that the real chain makes."""
        held = [self.latents, *self.texts, *(v for v in self.arguments.values() if isinstance(v, Tensor))]
        held += [t for m in self.modules() for t in (*m.parameters(), *m.buffers())]
        held += [t.grad for t in held if t.grad is not None]
        before = sum({t.untyped_storage()._cdata: storage_bytes(t) for t in held}.values())
        grads = [(t, None if t.grad is None else t.grad.clone()) for t in held if t.is_leaf]
        with LiveBytes() as live:
            sample = self.sample(**more)
            self.backward(sample)
        for tensor, grad in grads:
            tensor.grad = grad
        return before + live.peak

    def alternatives(self) -> tuple[Any, ...]:
        with pytest.raises(prfl_fast.InfeasibleBudget) as caught:
            self.sample(memory_budget=1)
        assert caught.value.least_bytes == min(way.peak_bytes for way in caught.value.alternatives)
        return caught.value.alternatives


def pointwise(dtype: torch.dtype = torch.float32, net: nn.Module | None = None, **arguments: Any) -> Case:
    net = Pointwise().to(dtype) if net is None else net
    return Case(net, torch.randn(2, 3, 2, 5, 7), ("c", "c"), **arguments)


def wan(dtype: torch.dtype, **arguments: Any) -> Case:
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    nn.Module.to(net, dtype)  # diffusers' own warns about parts that it would keep in float32
    return Case(net, torch.randn(1, 4, 3, 8, 8), ("encoder_hidden_states",) * 2, **arguments)


def given_gradients(case: Case) -> Case:
    for parameter in case.net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return case


def latent_gradients(case: Case) -> Case:
    case.latents.requires_grad_()
    case.texts[0].requires_grad_()
    return case


def own_text_every_step(case: Case) -> Case:
    texts = [torch.randn_like(case.texts[0]).repeat(1, 1).requires_grad_() for _ in range(case.steps)]
    case.arguments["conditioning"] = lambda step, timestep: {case.key: texts[step]}
    case.texts += texts
    return case


def masked() -> Case:
    return pointwise(latent_mask=torch.rand(2, 3, 2, 5, 7) > 0.5, solver="scheduler", graph="steps")


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
CASES: dict[str, Callable[[], Case]] = {
    "plain": lambda: pointwise(),
    "float64": lambda: pointwise(F64, guidance_scale=2.0),
    "bfloat16": lambda: pointwise(BF16, scheduler="euler"),
    "scheduler": lambda: pointwise(solver="scheduler", guidance_scale=2.0),
    "steps": lambda: pointwise(graph="steps", guidance_scale=2.0),
    "steps, accumulated": lambda: given_gradients(pointwise(graph="steps")),
    "accumulated": lambda: given_gradients(pointwise(guidance_scale=2.0)),
    "one step in the middle": lambda: pointwise(gradient="step:1"),
    "constant branch": lambda: pointwise(guidance_scale=2.0, guidance_gradient="conditional", gradient="last:1"),
    "cut inputs": lambda: pointwise(gradient=prfl_fast.GradientMode((0, 1, 0, 1, 0), (0, 0, 0, 0, 0))),
    "taps": lambda: pointwise(gradient="last:5", supervise=(5, 9), steps=9, scheduler="dpm"),
    "taps, steps": lambda: pointwise(supervise=(2, 9), steps=9, graph="steps"),
    "no gradient": lambda: pointwise(gradient="none"),
    "frozen": lambda: latent_gradients(pointwise(net=Pointwise(trainable=0).requires_grad_(False))),
    "partly frozen": lambda: latent_gradients(pointwise(net=Pointwise(trainable=1), graph="steps")),
    "two experts": lambda: pointwise(
        transformer_2=Pointwise(width=8), boundary_ratio=0.8, guidance_scale=2.0, guidance_scale_2=1.0
    ),
    "text of each step": lambda: own_text_every_step(pointwise()),
    "text of each step, steps": lambda: own_text_every_step(pointwise(graph="steps")),
    "masked": masked,
    "Wan float32": lambda: wan(F32),
    "Wan bfloat16": lambda: wan(BF16, guidance_scale=3.0),
    "Wan bfloat16, steps": lambda: wan(BF16, graph="steps", scheduler="euler"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_measured_peak_stays_within_every_budget_that_is_accepted(name: str) -> None:
    """Predicted: weights, gradients, latents and graphs; measured: the same real tensors, counted.

    The prediction may be higher: by the solver's state (up to x, the sample before and three predictions), which it
    counts once more, and by as much again where the peak comes before the history is complete.
    """
    case = CASES[name]()
    ways = case.alternatives()
    wide = torch.promote_types(next(case.net.parameters()).dtype, case.latents.dtype)
    latent = storage_bytes(torch.empty_like(case.latents, dtype=wide))
    for way in ways:
        with LiveBytes() as live:
            plan = case.sample(memory_budget=way.peak_bytes).plan
        assert plan.predicted_peak_bytes <= way.peak_bytes
        assert case.measured(plan=plan) <= plan.predicted_peak_bytes
        # The trace itself is not in the caller's count: only what the sampling made.
        assert live.peak <= way.peak_bytes
        if way.recompute == "planned":  # blocks that keep different things need less than any one keep-set for all
            continue
        measured = case.measured(plan=prfl_fast.MemoryPlan(way.recompute, way.keep_last_call))
        assert measured <= way.peak_bytes <= measured + 10 * latent
    smaller = min(way.peak_bytes for way in ways) - 1
    with pytest.raises(prfl_fast.InfeasibleBudget):
        case.sample(memory_budget=smaller)


@pytest.mark.parametrize("name", tinyfamilies.TEXT)
def test_every_family_can_be_predicted(name: str) -> None:
    """In float64, masks and all; weights and text are counted by hand."""
    twin = tinyfamilies.make(name)
    net: Any = twin.net
    arguments = (net, twin.scheduler, twin.latents, None)
    with pytest.raises(prfl_fast.InfeasibleBudget) as caught:
        prfl_fast.unrolled_sample(*arguments, conditioning=twin.conditioning, memory_budget=1)
    held = [twin.latents, *twin.conditioning.values(), *net.parameters(), *net.buffers()]
    storages = {t.untyped_storage()._cdata: storage_bytes(t) for t in held if isinstance(t, Tensor)}
    for way in caught.value.alternatives:
        if way.recompute == "planned":
            continue
        plan = prfl_fast.MemoryPlan(way.recompute, way.keep_last_call)
        with LiveBytes() as live:
            sample = prfl_fast.unrolled_sample(*arguments, conditioning=twin.conditioning, plan=plan)
            sample.latents.sum().backward()
            del sample
        net.zero_grad()
        latent = storage_bytes(twin.latents)
        assert live.peak + sum(storages.values()) <= way.peak_bytes <= live.peak + sum(storages.values()) + 10 * latent


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_recomputed_blocks_lower_the_peak(dtype: torch.dtype) -> None:
    """Wan's blocks hold most of a call's graph, so what is saved is more than a third of what is beside the weights."""
    case = wan(dtype)
    ways = case.alternatives()
    assert [way.recompute for way in ways[:2]] == ["call", "blocks"]
    assert ways[1].peak_bytes < ways[0].peak_bytes
    plan = case.sample(memory_budget=ways[0].peak_bytes - 1).plan
    assert plan.recompute == "planned" and plan.extra_ns < case.sample(memory_budget=ways[1].peak_bytes).plan.extra_ns
    assert case.sample(memory_budget="1TiB").plan.recompute == "call"


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_memory_grows_by_one_latent_per_step_and_by_nothing_else(scheduler: str, guided: bool, graph: str) -> None:
    """At most: the network's input of each step (the table of a linear solver keeps nothing) and the norm of its
    gradient, one number, 512 bytes as counted. After 4 steps the solver's history (4 entries) may not be complete."""
    case = Case(Pointwise(), torch.randn(2, 3, 2, 16, 16), ("c", "c"), scheduler, graph=graph)
    if guided:
        case.arguments["guidance_scale"] = 2.0
    peaks = {}
    for case.steps in (4, 8, 16):
        case.sample(gradient="none")  # the scheduler is probed once, and then known
        peaks[case.steps] = case.measured()
    latent = storage_bytes(case.latents)
    assert peaks[16] - peaks[8] <= 8 * (latent + 512)
    assert peaks[8] - peaks[4] <= 4 * (latent + 512) + 4 * latent
    # It does grow: the count sees the latents that are kept.
    assert peaks[16] - peaks[8] >= 8 * latent - latent


@pytest.mark.parametrize("plan", [("call", True), ("call", False), ("blocks", True), ("blocks", False)])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_every_plan_gives_the_same_bits(plan: tuple[str, bool], graph: str) -> None:
    """Recomputation repeats the same operations in the same order, dropout included."""

    def gradients(**arguments: Any) -> dict[str, Tensor]:
        problem = plainloop.Problem(seed=3, scheduler=plainloop.scheduler("unipc"), steps=4, scale=2.0, dropout=0.3)
        torch.manual_seed(1)
        return problem.chain_gradients(graph=graph, **arguments)

    expected = gradients(plan=prfl_fast.MemoryPlan("call", True))
    actual = gradients(plan=prfl_fast.MemoryPlan(*plan))
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert all(bool(value.any()) for value in expected.values())


def test_a_prediction_changes_nothing_and_calls_nothing_for_real() -> None:
    problem = plainloop.Problem(seed=4, scheduler=plainloop.scheduler("dpm"), steps=4, scale=2.0, dropout=0.3)
    generator = torch.Generator().manual_seed(5)

    def run(**arguments: Any) -> list[Tensor]:
        torch.manual_seed(1)
        generator.manual_seed(5)
        gradients = problem.chain_gradients(generator=generator, **arguments)
        return [*gradients.values(), torch.rand(1), torch.rand(1, generator=generator)]

    expected = run()
    calls, problem.net.calls = problem.net.calls, 0
    assert all(map(torch.equal, run(memory_budget="1GiB"), expected))
    assert problem.net.calls == calls
    problem.clear()
    with pytest.raises(prfl_fast.InfeasibleBudget, match=r"^memory_budget: 2\.00 KiB \(2048 bytes\) can't hold"):
        problem.sample(memory_budget="2KiB")
    assert problem.net.calls == calls
    assert all(p.grad is None for p in problem.net.parameters())
    assert all(type(t) is nn.Parameter for t in problem.net.parameters())


def test_the_price_does_not_grow_with_the_steps() -> None:
    case = pointwise()
    counts = []
    for case.steps in (5, 20):
        CALLS.clear()
        case.alternatives()
        counts.append(len(CALLS))
    assert counts[0] == counts[1] > 0


def test_a_plan_can_be_used_again_and_not_together_with_a_budget() -> None:
    case = pointwise()
    plan = case.sample(memory_budget="1GiB").plan
    assert plan.budget_bytes == 2**30 and plan.predicted_peak_bytes is not None
    assert case.sample(plan=plan).plan is plan
    with pytest.raises(ValueError, match="memory_budget, plan"):
        case.sample(plan=plan, memory_budget="1GiB")


def test_networks_that_no_prediction_is_possible_for() -> None:
    refusal = r"^memory_budget: expected a network that can be traced"
    case = pointwise(net=Pointwise(decides=True))
    with pytest.raises(UntraceableError, match=refusal):
        case.sample(memory_budget="1GiB")
    case.backward(case.sample(plan=prfl_fast.MemoryPlan("blocks")))

    hidden = torch.ones((), requires_grad=True)
    net = Pointwise()
    plain = net.first.forward
    net.first.forward = lambda x: plain(x) * hidden
    for graph in ("chain", "steps"):
        with pytest.raises(UntraceableError, match="none of its parameters"):
            pointwise(net=net, graph=graph).sample(memory_budget="1GiB")
    assert hidden.grad is None

    case = pointwise()
    module, case.net = case.net, lambda x, t, c: module(x, t, c)
    with pytest.raises(UntraceableError, match="a plain callable hides its weights"):
        case.sample(memory_budget="1GiB")

    class FSDPPointwise(Pointwise):
        pass

    with pytest.raises(UntraceableError, match="sharded by FSDP"):
        pointwise(net=FSDPPointwise()).sample(memory_budget="1GiB")


@pytest.mark.parametrize("budget", ["60", 0, 1.5, True, [1]])
def test_bad_budgets_are_refused_before_any_call(budget: Any) -> None:
    case = pointwise()
    CALLS.clear()
    with pytest.raises((TypeError, ValueError), match=r"^memory_budget: expected"):
        case.sample(memory_budget=budget)
    assert not CALLS


def test_what_a_trace_would_warn_of_is_left_to_the_real_run() -> None:
    case = pointwise()
    net = case.net
    original = net.last.forward

    def warning(x: Tensor) -> Tensor:
        warnings.warn("from the network", UserWarning, stacklevel=1)
        return original(x)

    net.last.forward = warning
    with pytest.raises(prfl_fast.InfeasibleBudget):
        case.sample(memory_budget=1)
