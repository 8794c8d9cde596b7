"""Guidance inside the solver's step against the same formula in plain torch before it: the same bits, less memory.

``guidance_fn`` gives the chain that formula as a function of the caller's, which it calls before the step. The step
itself runs on one backend both times, so nothing may differ but the way of the two branches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import plainloop
import pytest
import tinyfamilies
import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast import ops
from prfl_fast.memory.plan import MemoryPlan
from prfl_fast.memory.trace import LiveBytes, storage_bytes
from prfl_fast.ops.library import COMPILED
from prfl_fast.sampling.guidance import Prediction
from prfl_fast.solvers import table

pytest.importorskip("diffusers")

STEPS = 4
BACKENDS = ["reference", *(["cpu"] if COMPILED is not None else [])]
Scale = float | Callable[[int], float]
# 1 makes one call; of 0 the chain itself combines; 0.001 and 1.001 leave one branch next to nothing of the gradient.
SCALES: list[Scale] = [5.0, -1.5, 0.0, 1.0, BY_STEP := [0.001, 1.0, -2.0, 1.001].__getitem__]


class Net(nn.Module):
    """net(x, t, c) in its own dtype; its prediction has gaps in memory."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3 + 1, 8), nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        tokens = x.to(self.last.weight.dtype).movedim(1, -1)
        time = (t / 1000).to(tokens.dtype).expand(*tokens.shape[:-1], 1)
        hidden = torch.tanh(self.first(torch.cat([tokens, time], -1)) + c[:, None, None, :])
        return self.last(hidden).movedim(-1, 1)


class Case:
    """One problem, sampled and differentiated by whatever way of guidance."""

    def __init__(self, dtype: torch.dtype, latents_dtype: torch.dtype = torch.float32) -> None:
        self.net = Net(dtype)
        self.latents = torch.randn(2, 3, 5, 7, dtype=latents_dtype).requires_grad_()
        self.texts = [torch.randn(2, 8).to(dtype).requires_grad_() for _ in range(2)]
        self.weights = torch.randn(self.latents.shape, dtype=latents_dtype)
        self.scheduler = plainloop.scheduler("unipc3")

    def named(self) -> dict[str, Tensor]:
        names = ["latents", "conditional", "unconditional"]
        return dict(zip(names, [self.latents, *self.texts], strict=True)) | dict(self.net.named_parameters())

    def sample(self, scale: Scale, *, fused: bool, **arguments: Any) -> prfl_fast.Sample:
        at = scale if callable(scale) else lambda step: scale
        return prfl_fast.unrolled_sample(
            self.net,
            self.scheduler,
            self.latents,
            STEPS,
            conditioning={"c": self.texts[0]},
            negative_conditioning={"c": self.texts[1]},
            guidance_scale=scale,
            guidance_fn=None if fused else lambda c, u, step: u + at(step) * (c - u),
            **arguments,
        )

    def run(self, scale: Scale, *, fused: bool, original: bool = False, **arguments: Any) -> dict[str, Tensor | None]:
        for tensor in self.named().values():
            tensor.grad = None
        sample = self.sample(scale, fused=fused, **arguments)
        losses = [(self.weights * tap.latents).sum() + tap.latents.square().sum() for tap in sample.taps]
        if original:
            losses.append((self.weights * sample.pred_original_sample).sum())
        torch.stack(losses).sum().backward()
        if arguments.get("graph") == "steps":
            sample.backward()
        told: dict[str, Tensor | None] = {name: tensor.grad for name, tensor in self.named().items()}
        told |= {f"tap {tap.step}": tap.latents.detach() for tap in sample.taps}
        return told | {"original": sample.pred_original_sample.detach(), "norms": sample.gradient_norms}


def assert_bits(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], eps: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        mine = actual[name]
        assert (mine is None) == (value is None), name
        if mine is None or value is None:
            continue
        assert mine.dtype == value.dtype, name
        if name == "norms":
            # Told from the larger share, s g or (1 - s) g: at most three roundings of eps / 2 to something no larger.
            assert torch.allclose(mine, value, rtol=1.5 * eps, atol=0, equal_nan=True)
        else:
            assert mine.equal(value), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("branches", ["both", "conditional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits(dtype: torch.dtype, branches: str, graph: str, backend: str) -> None:
    case = Case(dtype)
    for scale in SCALES:
        arguments = {"graph": graph, "guidance_gradient": branches}
        with ops.backend(backend):
            expected = case.run(scale, fused=False, **arguments)
            actual = case.run(scale, fused=True, **arguments)
        assert_bits(actual, expected, torch.finfo(dtype).eps)
        known = expected["unconditional"] is not None
        assert known == (branches == "both" and scale != 1.0)


MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
OTHERS: dict[str, dict[str, Any]] = {
    "taps": {"supervise": (1, 3, 4)},
    "taps on graphs of their own": {"supervise": (2, 4), "gradient": "last:1"},
    "one step, then constant ones": {"gradient": "step:1"},
    "parameters alone": {"gradient": prfl_fast.GradientMode((1.0,) * STEPS, (0.0,) * STEPS)},
    "inputs alone": {"gradient": prfl_fast.GradientMode((0.0,) * STEPS, (1.0,) * STEPS)},
    # Powers of two, so that it does not matter where they are multiplied.
    "weights": {"gradient": prfl_fast.GradientMode((0.5, 2.0, 0.0, 1.0), (1.0, 0.25, 0.5, 1.0))},
    "mask": {"latent_mask": MASK},
    "watched": {"detect_nonfinite": True, "verify_recompute": True},
    "last call recomputed": {"plan": MemoryPlan("call", False)},
}


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_same_bits_with(name: str, graph: str) -> None:
    case = Case(torch.bfloat16)
    expected = case.run(4.0, fused=False, graph=graph, **OTHERS[name])
    assert_bits(case.run(4.0, fused=True, graph=graph, **OTHERS[name]), expected, 2.0**-8)


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bfloat16_wan_has_the_same_bits(backend: str, graph: str) -> None:
    twin = tinyfamilies.make("wan", torch.bfloat16)
    results = []
    for fused in (False, True):
        latents = twin.latents.clone().requires_grad_()
        positive = tinyfamilies.leaves(twin.conditioning)
        text = (0.5 * positive["encoder_hidden_states"].detach().roll(1, 0)).requires_grad_()
        twin.net.zero_grad()
        with ops.backend(backend):
            sample = prfl_fast.unrolled_sample(
                twin.net,
                plainloop.scheduler("unipc"),
                latents,
                3,
                conditioning=positive,
                negative_conditioning={"encoder_hidden_states": text},
                guidance_scale=5.0,
                guidance_fn=None if fused else lambda c, u, step: u + 5.0 * (c - u),
                graph=graph,
            )
            sample.latents.square().sum().backward()
            if graph == "steps":
                sample.backward()
        leaves = [latents, text, *(v for v in positive.values() if isinstance(v, Tensor) and v.requires_grad)]
        results.append([sample.latents.detach(), *(t.grad for t in [*leaves, *twin.net.parameters()])])
    tinyfamilies.assert_equal(results[1], results[0])


@pytest.mark.skipif(COMPILED is None, reason="installed without compiled ops")
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_the_compiled_step_is_the_plain_formula(graph: str) -> None:
    """Fused products against plain torch's, in float64: 5 steps of 6 terms, forward and backward, each 2^-53 apart and
    grown by the network's condition, of which 100 is left: 60 * 100 * 2^-53."""
    problem = plainloop.Problem(seed=21, scheduler=plainloop.scheduler("unipc3"), steps=5, scale=3.5)
    with ops.backend("reference"):
        expected = problem.chain_gradients(graph=graph, guidance_fn=lambda c, u, step: u + 3.5 * (c - u))
    with ops.backend("cpu"):
        actual = problem.chain_gradients(graph=graph)
    plainloop.assert_same(actual, expected, 6000 * 2.0**-53)


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_fractional_weights_of_both_branches(graph: str) -> None:
    mode = prfl_fast.GradientMode(parameters=(0.0, 0.7, 2.1, 0.0, 1.0), input=(1.0, 0.3, 0.0, 0.6, 1.0))
    problem = plainloop.Problem(seed=22, scheduler=plainloop.scheduler("unipc"), steps=5, scale=-2.5)
    # As in test_exact_gradient.py: float64 in another order.
    plainloop.assert_same(problem.chain_gradients(graph=graph, gradient=mode), problem.plain_gradients(mode), 1e-10)


def test_the_denoised_prediction_joins_in() -> None:
    """Its gradient reaches the branches apart from the latents': added up behind guidance, not before it. A handful of
    float64 roundings, 2^-53 each, whose sums cancel at most a thousandfold."""
    case = Case(torch.float64, torch.float64)
    expected = case.run(4.0, fused=False, original=True)
    actual = case.run(4.0, fused=True, original=True)
    for name, value in expected.items():
        mine = actual[name]
        assert mine is not None and value is not None
        assert float((mine - value).norm()) <= 8000 * 2.0**-53 * float(value.norm()), name


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_the_step_is_handed_both_branches_where_it_can_be(graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[int] = []

    def spy(state: Any, outputs: tuple[Tensor, ...], *arguments: Any, **keywords: Any) -> Any:
        handed.append(len(outputs))
        return ops.solver_step(state, outputs, *arguments, **keywords)

    monkeypatch.setattr(table, "solver_step", spy)
    case = Case(torch.float32)
    for scale, fused, solver, expected in [
        (5.0, True, "table", [2, 2, 2, 2]),
        (BY_STEP, True, "table", [2, 1, 2, 2]),
        (0.0, True, "table", [1, 1, 1, 1]),
        (1.0, True, "table", [1, 1, 1, 1]),
        (5.0, False, "table", [1, 1, 1, 1]),
        (5.0, True, "scheduler", []),
    ]:
        handed.clear()
        case.run(scale, fused=fused, graph=graph, solver=solver)
        assert handed == expected


@pytest.mark.parametrize("trained", [False, True])
def test_only_one_branch_may_have_a_gradient(trained: bool) -> None:
    """A frozen network on constant latents: the first step's call has a gradient where its text has one."""
    case = Case(torch.float32)
    case.net.requires_grad_(trained)
    case.latents.requires_grad_(False)
    for graph, k in itertools.product(("chain", "steps"), (0, 1)):
        case.texts[k].requires_grad_(False)
        expected = case.run(1.5, fused=False, graph=graph)
        assert_bits(case.run(1.5, fused=True, graph=graph), expected, 2.0**-23)
        case.texts[k].requires_grad_(True)


class Watched(nn.Module):
    """x * w: what lives beside the chain's own tensors is one latent for each call. Notes the live bytes at each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.before: list[int] = []
        self.live: LiveBytes | None = None

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        assert self.live is not None
        self.before.append(self.live.current)
        return x * self.weight


@pytest.mark.parametrize("gradient", ["full", "none"])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_nothing_lives_beside_a_call_that_it_does_not_need(graph: str, gradient: str) -> None:
    latents = torch.randn(1, 3, 64, 64)
    one = storage_bytes(latents)

    def run(fused: bool) -> tuple[list[int], int]:
        net = Watched()
        with LiveBytes() as net.live:
            sample = prfl_fast.unrolled_sample(
                net,
                plainloop.scheduler("euler"),
                latents,
                STEPS,
                conditioning={"c": torch.zeros(1)},
                negative_conditioning={"c": torch.zeros(1)},
                guidance_scale=5.0,
                guidance_fn=None if fused else lambda c, u, step: u + 5.0 * (c - u),
                graph=graph,
                gradient=gradient,
            )
            if gradient != "none":
                sample.latents.backward(latents)
                if graph == "steps":
                    sample.backward()
        return net.before, net.live.peak

    (_, unfused), (before, fused) = run(False), run(True)
    assert fused <= unfused
    # The latents at the start are the caller's. Whatever is smaller than a latent is a handful of scalars.
    forward = [size // one for size in before[: 2 * STEPS]]
    # Each step's own latents, then the conditional prediction; with a gradient those of earlier steps too.
    inputs = [min(step, 1) if gradient == "none" else step for step in range(STEPS)]
    assert forward == [count + branch for count in inputs for branch in (0, 1)]


def test_a_prediction_of_two_dtypes_is_of_their_common_one() -> None:
    both = Prediction(torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float32), 3.0)
    assert both.dtype == both.combined().dtype == torch.float32
    assert both.combined().equal(torch.full((2,), -2.0)) and both.detach().shares == (3.0, -2.0)
