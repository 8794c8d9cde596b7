"""Autocast around the call, compiled networks, conditioning in lists, noise and dropout from one generator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import familyloop
import plainloop
import pytest
import torch
from familyloop import STEPS, Case
from torch import Tensor

import prfl_fast

pytest.importorskip("diffusers")


def autocast(cache: bool = True) -> Any:
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=cache)


@pytest.fixture(scope="module")
def rounded() -> tuple[dict[str, Tensor], dict[str, float]]:
    """The plain loop under autocast, and how far autocast's bfloat16 moves it from float32."""
    plain, exact = Case("wan", torch.float32).plain(autocast), Case("wan", torch.float32).plain()
    return plain, {group: float((plain[group] - exact[group]).norm()) for group in plain}


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("solver", ["table", "scheduler"])
def test_autocast(solver: str, graph: str, outside: bool, rounded: Any) -> None:
    """Backward belongs outside of autocast, where operations run in their forward's dtype; it is right inside too.
    Two computations in bfloat16 are apart by no more than twice what bfloat16 does to one; weights that autocast has
    cast stay cast from one call to the next in the plain loop, so their gradient is summed in bfloat16 there."""
    plain, noise = rounded
    case = Case("wan", torch.float32)
    if outside:
        actual = case.chain(autocast, solver=solver, graph=graph)
    else:
        with autocast():
            actual = case.chain(solver=solver, graph=graph)
    for group, expected in plain.items():
        assert 2.0**-14 * float(expected.norm()) < noise[group] < 0.1 * float(expected.norm())
        assert float((actual[group] - expected).norm()) <= 2 * noise[group], group
    assert torch.is_autocast_cache_enabled()


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("gradient", ["last:1", "step:1"])
def test_autocast_after_calls_without_gradient(gradient: str, graph: str) -> None:
    """Weights that autocast has cast in a call without gradient must not serve the call with one. Without a cache the
    plain call can't fall into that trap; the two are the same operations but for the cache."""
    case = Case("wan", torch.float32)
    cached: list[bool] = []
    case.net.register_forward_pre_hook(lambda module, inputs: cached.append(torch.is_autocast_cache_enabled()))
    with autocast():
        with torch.no_grad():
            case.net(case.latents, torch.ones(2), case.text)  # the user's own, before: a baseline, say
        sample = case.sample(gradient=gradient, graph=graph, solver="scheduler")
        loss = case.loss(sample.latents)
    loss.backward()
    if graph == "steps":
        sample.backward()
    actual = case.gradients()
    # Newer torch casts anew by itself; so that older ones do, no call of the chain, recomputed ones too, has a cache.
    assert cached == [True] + [False] * sample.network_calls
    with autocast(cache=False):
        sample = case.sample(gradient=gradient, solver="scheduler")
        loss = case.loss(sample.latents)
    loss.backward()
    expected = case.gradients()
    assert float(expected["weights"].norm()) > 0
    for group, value in expected.items():
        # graph="steps" may round a cotangent to the scheduler's dtype at another place: once a step.
        assert float((actual[group] - value).norm()) <= STEPS * 2.0**-8 * float(value.norm()), group


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_compiled_network(graph: str, backend: str) -> None:
    problem = plainloop.Problem(seed=3, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0)
    expected = problem.plain_gradients()
    own = problem.net
    compiled: Any = torch.compile(_without_counter(own), backend=backend)
    problem.net = compiled
    problem.clear()
    sample = problem.sample(graph=graph)
    problem.loss(sample.latents).backward()
    if graph == "steps":
        sample.backward()
    assert sample.network_calls == 2 * 6 - 1
    actual = {k.removeprefix("_orig_mod."): v for k, v in problem.gradients().items()}
    plainloop.assert_same(actual, expected, 1e-10)
    torch.compiler.reset()


def _without_counter(net: Any) -> Any:
    """A counter that grows with every call would be a constant to the compiler, and compiled anew for each."""
    forward = type(net).forward

    class Plain(type(net)):  # type: ignore[misc]
        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            time = (t.double() / 1000).reshape(-1, 1).expand(x.shape[0], 1)
            h = torch.tanh(self.first(torch.cat([x.flatten(1), time, c], 1)))
            for block in self.blocks:
                h = h + self.drop(torch.tanh(block(h)))
            return self.last(h).reshape(x.shape)

    assert forward is not Plain.forward
    net.__class__ = Plain
    return net


class ListNet(torch.nn.Module):
    """net(x, t, parts): conditioning in a list inside a dictionary, as some families take their text."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, parts: Any) -> Tensor:
        return torch.tanh(x @ self.weight + parts["text"][0] * parts["text"][1] + t / 1000)


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_conditioning_inside_lists(graph: str) -> None:
    net, scheduler = ListNet(), plainloop.scheduler("unipc")
    encoder = torch.nn.Linear(4, 4).double()
    raw, latents = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    leaf = torch.randn(2, 4, dtype=torch.float64).requires_grad_()
    own = copy.deepcopy(scheduler)
    own.set_timesteps(3)
    text, x = encoder(raw), latents
    for t in own.timesteps:
        x = own.step(net(x, t, {"text": [text, leaf]}), t, x, return_dict=False)[0]
    wanted = [leaf, net.weight, encoder.weight]
    expected = torch.autograd.grad(x.square().sum(), wanted)
    sample = prfl_fast.unrolled_sample(
        net, scheduler, latents, 3, conditioning={"parts": {"text": [encoder(raw), leaf]}}, graph=graph
    )
    sample.latents.square().sum().backward()
    if graph == "steps":
        sample.backward()
    for tensor, value in zip(wanted, expected, strict=True):
        assert (tensor.grad - value).norm() <= 1e-10 * value.norm()


def plain_ancestral(net: Any, scheduler: Any, latents: Tensor, steps: int, generator: Any) -> Tensor:
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    x = latents * own.init_noise_sigma
    for t in own.timesteps:
        x = own.step(net(own.scale_model_input(x, t), t), t, x, generator=generator, return_dict=False)[0]
    return x


def network(dtype: torch.dtype, dropout: float) -> Callable[..., Tensor]:
    torch.manual_seed(3)
    ends = torch.nn.Linear(6, 9), torch.nn.Linear(9, 6)
    inner = torch.nn.Sequential(ends[0], torch.nn.Tanh(), torch.nn.Dropout(dropout), ends[1])
    inner.to(dtype)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inner(x.to(dtype))

    return Net()


@pytest.mark.parametrize("generators", ["one", "list", "global"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("solver", ["table", "scheduler"])
def test_noise_is_the_schedulers_own(
    solver: str, graph: str, dtype: torch.dtype, dropout: float, generators: str
) -> None:
    """EulerAncestral draws in the dtype of the network's output, after the call, maybe from dropout's generator."""
    import diffusers

    scheduler, net = diffusers.EulerAncestralDiscreteScheduler(), network(dtype, dropout)
    latents = torch.randn(3, 6)

    def seeded() -> Any:
        torch.manual_seed(9)
        if generators == "global":
            return None
        made = [torch.Generator().manual_seed(7 + k) for k in range(3)]
        return made if generators == "list" else made[0]

    plain = plain_ancestral(net, scheduler, latents, 4, seeded())
    expected = torch.autograd.grad(plain.square().sum() / 2, list(net.parameters()))
    own = copy.deepcopy(scheduler)
    own.set_timesteps(4)
    sample = prfl_fast.unrolled_sample(
        net, scheduler, latents * own.init_noise_sigma, 4, solver=solver, graph=graph, generator=seeded()
    )
    (sample.latents.square().sum() / 2).backward()
    if graph == "steps":
        sample.backward()
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    # Other noise is off by order 1. The scheduler's own step: the loop's bits; the table: roundings of 4 steps, with
    # sigmas up to 15 and the network's condition in front of them.
    if solver == "scheduler":
        assert torch.equal(sample.latents.detach().float(), plain.detach().float())
    else:
        assert (sample.latents - plain).norm() <= 16 * unit * plain.norm()
    for parameter, value in zip(net.parameters(), expected, strict=True):
        assert (parameter.grad - value).norm() <= 32 * unit * value.norm()


def test_a_bound_that_can_fail() -> None:
    """The measure of these tests: a gradient without its last step is far outside of it."""
    plain, noise = familyloop.reference("wan", torch.float32, True)
    short = Case("wan", torch.float32, lora=True).chain(gradient="last:2")
    assert float((short["lora"] - plain["lora"]).norm()) > 100 * noise["lora"]
