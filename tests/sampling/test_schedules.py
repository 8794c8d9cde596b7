"""float64 throughout: schedules, shapes and experts against the plain loop, relative 1e-10 (see test_exact_gradient).

The schedulers here (UniPC, DDIM) compute in float64 where they are given float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import plainloop
import pytest
import torch
from torch import Tensor

import prfl_fast

pytest.importorskip("diffusers")

TOLERANCE = 1e-10


class FreeNet(torch.nn.Module):
    """net(x, t, c): float64, any shape; every element depends on its sample's mean, so on every other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        a, b, d, e, f = self.weight
        mean = (x * c).flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(a * x + b * mean) * d + e * torch.sin(x) * (t.double() / 1000) + f * c


Call = Callable[[Tensor, Tensor, int], Tensor]


def loop(scheduler: Any, x: Tensor, call: Call, *, steps: int | None, start: int = 0, stop: int | None = None) -> Any:
    """Latents after every step. A chain that starts late has an empty history, as the scheduler's own has there."""
    own = copy.deepcopy(scheduler)
    if steps is not None:
        own.set_timesteps(steps)
    if start and hasattr(own, "set_begin_index"):
        own.set_begin_index(start)
    for i, t in list(enumerate(own.timesteps))[start:stop]:
        x = own.step(call(own.scale_model_input(x, t), t, i), t, x, return_dict=False)[0]
        yield x


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, wanted))


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert float(e.norm()) > 0
        assert float((a - e).norm()) <= tolerance * float(e.norm())


def taken(sample: prfl_fast.Sample, loss: Tensor, wanted: list[Tensor], graph: str) -> list[Tensor]:
    for tensor in wanted:
        tensor.grad = None
    loss.backward()
    if graph == "steps":
        sample.backward()
    return [tensor.grad for tensor in wanted]


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("solver", ["table", "scheduler"])
@pytest.mark.parametrize("name", ["unipc", "unipc3", "ddim"])
@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("whole", (3, 2, 1, 3, 5)),
        ("whole", (1, 1, 1, 1, 1)),
        ("one step", (3, 1)),
        ("late", (1, 3, 5, 7)),
        ("custom", (3, 5, 2)),
    ],
)
def test_shapes_and_schedules(case: str, name: str, shape: tuple[int, ...], solver: str, graph: str) -> None:
    net, scheduler = FreeNet(), plainloop.scheduler(name)
    # Not contiguous: the last two dimensions, or batch and next, stored the other way round.
    stored = torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64)
    latents = stored.transpose(-1, -2).requires_grad_()
    c = torch.randn(shape, dtype=torch.float64).requires_grad_()
    steps: int | None = {"one step": 1}.get(case, 5)
    start = 2 if case == "late" else 0
    if case == "custom":
        # DDIM finds its previous timestep from the number of steps; flow schedules take any noise levels.
        scheduler.set_timesteps(4)
        if name != "ddim":
            scheduler.sigmas = torch.tensor([0.98, 0.7, 0.35, 0.1, 0.0])
            scheduler.timesteps = (1000 * scheduler.sigmas[:-1]).long()
        steps = None
    before = copy.deepcopy(scheduler.__dict__)
    wanted = [latents, c, net.weight]
    *_, end = loop(scheduler, latents, lambda x, t, i: net(x, t, c), steps=steps, start=start)
    expected = gradients(end.square().sum() + end.sum(), wanted)
    sample = prfl_fast.unrolled_sample(
        net, scheduler, latents, steps, start_step=start, conditioning={"c": c}, solver=solver, graph=graph
    )
    assert (sample.latents - end).norm() <= TOLERANCE * end.norm()
    actual = taken(sample, sample.latents.square().sum() + sample.latents.sum(), wanted, graph)
    assert_close(actual, expected)
    assert str(before) == str(scheduler.__dict__)


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("both", [True, False])
def test_taps_guidance_and_two_experts_together(both: bool, graph: str) -> None:
    """Each tap's loss reaches both experts, both branches' conditioning and the latents, whatever lies between."""
    high, low, scheduler = FreeNet(1), FreeNet(2), plainloop.scheduler("unipc")
    latents = torch.randn(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    c, u = (torch.randn(2, 3, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2))
    boundary = 0.6

    def call(x: Tensor, t: Tensor, i: int) -> Tensor:
        net, scale = (high, 3.0 + i) if t >= boundary * 1000 else (low, 2.0)
        conditional, other = net(x, t, c), net(x, t, u)
        other = other if both else other.detach()
        return other + scale * (conditional - other)

    points = list(loop(scheduler, latents, call, steps=6))
    loss = points[1].square().sum() + points[3].sum() + points[5].square().sum() / 2
    wanted = [latents, c, high.weight, low.weight] + ([u] if both else [])
    expected = gradients(loss, wanted)
    assert low.calls and high.calls
    high.calls = low.calls = 0
    sample = prfl_fast.unrolled_sample(
        high, scheduler, latents, 6, conditioning={"c": c}, negative_conditioning={"c": u}, supervise=(2, 4, 6),
        guidance_scale=lambda i: 3.0 + i, guidance_scale_2=2.0, transformer_2=low, boundary_ratio=boundary,
        guidance_gradient="both" if both else "conditional", graph=graph,
    )  # fmt: skip
    first, second, third = (tap.latents for tap in sample.taps)
    actual = taken(sample, first.square().sum() + second.sum() + third.square().sum() / 2, wanted, graph)
    assert_close(actual, expected)
    assert u.grad is None or both
    assert high.calls + low.calls == sample.network_calls == (2 * 12 - 1 if both else 12 + 6 - 1)


@pytest.mark.parametrize("gradient", ["last:1", "last:3", "step:1", "drtune:2"])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_modes_across_taps_and_experts(graph: str, gradient: str) -> None:
    """The mode applies to the chain that ends at each tap, in either expert."""
    high, low, scheduler = FreeNet(1), FreeNet(2), plainloop.scheduler("unipc")
    latents = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    c = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    taps = (2, 5)
    sample = prfl_fast.unrolled_sample(
        high, scheduler, latents, 6, conditioning={"c": c}, supervise=taps, transformer_2=low, boundary_ratio=0.6,
        gradient=gradient, graph=graph, generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    wanted = [latents, c, high.weight, low.weight]
    actual = taken(sample, torch.stack([t.latents.square().sum() for t in sample.taps]).sum(), wanted, graph)
    kind, _, number = gradient.partition(":")
    drawn: set[int] = set()
    if kind == "drtune":  # the offset is drawn for the whole chain, that of the last tap
        gap = taps[-1] // int(number)
        offset = int(torch.randint(0, taps[-1] - gap, (1,), generator=torch.Generator().manual_seed(4)))
        drawn = {offset, offset + gap}
    loss = torch.zeros((), dtype=torch.float64)
    for tap in taps:
        chosen = {"last": set(range(tap - int(number), tap)), "step": {1}, "drtune": drawn}[kind]

        def call(x: Tensor, t: Tensor, i: int, chosen: set[int] = chosen) -> Tensor:
            net = high if t >= 600 else low
            return net(x.detach() if kind == "drtune" else x, t, c) if i in chosen else net(x, t, c).detach()

        *_, end = loop(scheduler, latents, call, steps=6, stop=tap)
        loss = loss + end.square().sum()
    expected = torch.autograd.grad(loss, wanted, allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None or not a.any()) if e is None else (a - e).norm() <= TOLERANCE * e.norm()
    assert sum(e is not None for e in expected) >= 3


def test_pred_original_sample_carries_an_exact_gradient() -> None:
    net, scheduler = FreeNet(), plainloop.scheduler("unipc")
    latents = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    c = torch.randn(2, 3, dtype=torch.float64).requires_grad_()
    own = copy.deepcopy(scheduler)
    own.set_timesteps(5)
    before, *_ = list(loop(scheduler, latents, lambda x, t, i: net(x, t, c), steps=5, stop=3))[-2:]
    original = before - own.sigmas[2].double() * net(before, own.timesteps[2], c)
    wanted = [latents, c, net.weight]
    expected = gradients(original.square().sum(), wanted)
    sample = prfl_fast.unrolled_sample(net, scheduler, latents, 5, stop_step=3, conditioning={"c": c})
    assert_close([sample.pred_original_sample.detach()], [original.detach()])
    actual = taken(sample, sample.pred_original_sample.square().sum(), wanted, "chain")
    assert_close(actual, expected)
    assert torch.isfinite(sample.gradient_norms[:3]).all()


def test_pred_original_sample_is_guarded_as_latents_are() -> None:
    net, scheduler = FreeNet(), plainloop.scheduler("unipc")
    arguments: dict[str, Any] = {"conditioning": {"c": torch.ones(2, 3, dtype=torch.float64)}}
    latents = torch.randn(2, 3, dtype=torch.float64)
    loss = prfl_fast.unrolled_sample(net, scheduler, latents, 4, **arguments).pred_original_sample.sum()
    with pytest.raises(RuntimeError, match="create_graph=True is unsupported"):
        torch.autograd.grad(loss, net.weight, create_graph=True)
    loss = prfl_fast.unrolled_sample(net, scheduler, latents, 4, **arguments).pred_original_sample.sum()
    with torch.no_grad():
        net.weight += 1
    with pytest.raises(prfl_fast.ModelChangedError):
        loss.backward()


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("solver", ["table", "scheduler"])
def test_gradient_norms_are_those_at_the_predictions(solver: str, graph: str) -> None:
    net, scheduler = FreeNet(), plainloop.scheduler("unipc")
    latents = torch.randn(2, 3, 2, dtype=torch.float64)
    c, u = torch.randn(2, 2, 3, 2, dtype=torch.float64)
    predictions: list[Tensor] = []

    def call(x: Tensor, t: Tensor, i: int) -> Tensor:
        other = net(x, t, u)
        predictions.append(other + 3.0 * (net(x, t, c) - other))
        return predictions[-1]

    *_, end = loop(scheduler, latents, call, steps=5, stop=4)
    expected = torch.stack([g.norm() for g in torch.autograd.grad(end.square().sum(), predictions)])
    sample = prfl_fast.unrolled_sample(
        net, scheduler, latents, 5, conditioning={"c": c}, negative_conditioning={"c": u}, guidance_scale=3.0,
        stop_step=4, solver=solver, graph=graph,
    )  # fmt: skip
    assert torch.isnan(sample.gradient_norms).all()
    taken(sample, sample.latents.square().sum(), [net.weight], graph)
    assert sample.gradient_norms.shape == (5,) and bool(torch.isnan(sample.gradient_norms[4]))
    assert_close([sample.gradient_norms[:4]], [expected])


@pytest.mark.parametrize("solver", ["table", "scheduler"])
def test_half_precision_latents_are_not_rounded_on_the_way_back(solver: str) -> None:
    """A step that forgets its latents (a network that predicts the sample, at the end) hands on float32 cotangents."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 6)
    latents = torch.randn(2, 6).to(torch.bfloat16)
    found = {}
    for graph in ("chain", "steps"):
        linear.zero_grad()
        sample = prfl_fast.unrolled_sample(
            lambda x, t: linear(x.float()), scheduler, latents, 4, solver=solver, graph=graph
        )
        taken(sample, sample.latents.square().sum(), [], graph)
        found[graph] = linear.weight.grad.clone()
    # float32 additions in another order, 4 steps; one rounding to bfloat16 would be 2^-9.
    unit = 2.0**-24 if solver == "table" else 2.0**-8
    assert (found["chain"] - found["steps"]).norm() <= 16 * unit * found["chain"].norm()


def test_every_order_of_taps_and_steps_costs_the_same_calls() -> None:
    for steps, branches in itertools.product((1, 2, 4), (1, 2)):
        net = FreeNet()
        c = torch.ones(1, 2, dtype=torch.float64)
        guided = {} if branches == 1 else {"negative_conditioning": {}, "guidance_scale": 2.0}
        sample = prfl_fast.unrolled_sample(
            net, plainloop.scheduler("ddim"), torch.randn(1, 2, dtype=torch.float64), steps,
            conditioning={"c": c}, supervise=range(1, steps + 1), **guided,
        )  # fmt: skip
        torch.stack([tap.latents.sum() for tap in sample.taps]).sum().backward()
        assert net.calls == 2 * steps * branches - 1
