"""The chain against the plain loop under autograd, in float64 throughout: relative 1e-10.

The bound: both sides do the same float64 arithmetic in another order, some 1e3 operations deep, so they agree to about
1e3 * 2^-53 = 1e-13 times the condition of the tiny network; 1e-10 leaves three digits for that.

Some schedulers round the latents to float32 in every step, whatever their dtype. Kept in the graph they do so on both
sides; their table, which is exact, differs from the loop by one such rounding a step, 2^-24, times that condition, of
which 10 is left here.
"""

from __future__ import annotations

import copy

import plainloop
import pytest
import torch

import prfl_fast

pytest.importorskip("diffusers")

STEPS = 5
TOLERANCE = 1e-10
ROUNDED_TOLERANCE = 10 * STEPS * 2.0**-24
ROUND_THE_LATENTS = {"dpm", "euler_epsilon"}


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("solver", ["table", "scheduler"])
@pytest.mark.parametrize("scale", [1.0, 3.5])
@pytest.mark.parametrize("name", ["unipc", "dpm", "ddim", "euler_epsilon"])
def test_full_chain_equals_plain_loop(name: str, scale: float, solver: str, graph: str) -> None:
    problem = plainloop.Problem(seed=3, scheduler=plainloop.scheduler(name), steps=STEPS, scale=scale)
    expected = problem.plain_gradients()
    actual = problem.chain_gradients(solver=solver, graph=graph, gradient="full")
    rounded = solver == "table" and name in ROUND_THE_LATENTS
    plainloop.assert_same(actual, expected, ROUNDED_TOLERANCE if rounded else TOLERANCE)


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("gradient", ["last:1", "last:3", "step:0", "step:2", "drtune:2", "random:3", "random", "full"])
def test_masks_equal_a_plain_loop_with_detached_calls(gradient: str, graph: str) -> None:
    problem = plainloop.Problem(seed=4, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=2.0)
    mode = plainloop.resolved(gradient, STEPS, seed=11)
    expected = problem.plain_gradients(mode)
    actual = problem.chain_gradients(
        graph=graph, gradient=gradient, generator=torch.Generator().manual_seed(11), solver="table"
    )
    plainloop.assert_same(actual, expected, TOLERANCE)


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_fractional_weights(graph: str) -> None:
    mode = prfl_fast.GradientMode(parameters=(0.0, 0.5, 2.0, 0.0, 1.0), input=(1.0, 0.25, 0.0, 0.5, 1.0))
    problem = plainloop.Problem(seed=5, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=1.0)
    expected = problem.plain_gradients(mode)
    actual = problem.chain_gradients(graph=graph, gradient=mode)
    plainloop.assert_same(actual, expected, TOLERANCE)
    assert all(p.requires_grad for p in problem.net.parameters())


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("gradient", ["full", "last:1", "last:2"])
@pytest.mark.parametrize("taps", [(3, 5), (1, 2, 5), (2, 3)])
def test_supervised_taps_sum_the_chains_that_end_there(taps: tuple[int, ...], gradient: str, graph: str) -> None:
    problem = plainloop.Problem(seed=6, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=2.0)
    expected = None
    for tap in taps:
        # A tap after fewer than K steps has all of them differentiated.
        own = f"last:{min(tap, int(gradient[5:]))}" if gradient != "full" else gradient
        part = problem.plain_gradients(plainloop.resolved(own, STEPS, stop=tap), stop=tap)
        expected = part if expected is None else {k: expected[k] + part[k] for k in part}
    assert expected is not None
    actual = problem.chain_gradients(graph=graph, gradient=gradient, supervise=taps)
    plainloop.assert_same(actual, expected, TOLERANCE)


def test_backward_with_a_loss_function_equals_backward_of_the_sum() -> None:
    problem = plainloop.Problem(seed=7, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=1.0)
    expected = problem.chain_gradients(graph="chain", supervise=(2, 5))
    seen: list[tuple[int, float]] = []

    def loss_fn(latents: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((step, float(timestep)))
        return problem.loss(latents)

    problem.clear()
    sample = problem.sample(graph="steps", supervise=(2, 5))
    total = sample.backward(loss_fn)
    plainloop.assert_same(problem.gradients(), expected, TOLERANCE)
    assert [step for step, _ in seen] == [5, 2] and seen[0][1] == 0
    losses = [problem.loss(tap.latents.detach()) for tap in sample.taps]
    assert torch.allclose(total, torch.stack(losses).sum())


def test_lora_like_frozen_parts_and_accumulation() -> None:
    problem = plainloop.Problem(seed=8, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=2.0)
    first = next(iter(problem.net.parameters()))
    first.requires_grad_(False)
    once = problem.chain_gradients()
    problem.clear()
    for _ in range(3):
        problem.loss(problem.sample().latents).backward()
    assert first.grad is None
    plainloop.assert_same({k: v / 3 for k, v in problem.gradients().items()}, once, TOLERANCE)


def test_retain_graph_hooks_and_autograd_grad() -> None:
    problem = plainloop.Problem(seed=9, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=2.0)
    once = problem.chain_gradients()
    problem.clear()
    sample = problem.sample()
    fired = []
    sample.latents.register_hook(lambda g: fired.append(float(g.norm())))
    loss = problem.loss(sample.latents)
    loss.backward(retain_graph=True)
    loss.backward()
    plainloop.assert_same({k: v / 2 for k, v in problem.gradients().items()}, once, TOLERANCE)
    assert len(fired) == 2
    problem.clear()
    names = [k for k, _ in problem.net.named_parameters()]
    parameters = [p for _, p in problem.net.named_parameters()]
    grads = torch.autograd.grad(problem.loss(problem.sample().latents), parameters)
    plainloop.assert_same(dict(zip(names, grads, strict=True)), {k: once[k] for k in names}, TOLERANCE)
    assert all(p.grad is None for p in parameters)


def test_two_samples_alive_at_once() -> None:
    a = plainloop.Problem(seed=10, scheduler=plainloop.scheduler("unipc"), steps=STEPS, scale=1.0)
    b = copy.deepcopy(a)
    expected = a.chain_gradients()
    a.clear()
    first, second = a.sample(), a.sample()
    a.loss(second.latents).backward()
    a.loss(first.latents).backward()
    plainloop.assert_same({k: v / 2 for k, v in a.gradients().items()}, expected, TOLERANCE)
    plainloop.assert_same(b.chain_gradients(), expected, 0.0)


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_dropout_is_the_same_in_the_recomputation(graph: str) -> None:
    problem = plainloop.Problem(seed=12, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0, dropout=0.3)
    torch.manual_seed(0)
    expected = problem.plain_gradients()
    torch.manual_seed(0)
    plainloop.assert_same(problem.chain_gradients(graph=graph), expected, TOLERANCE)


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_conditioning_with_a_graph_of_its_own(graph: str) -> None:
    problem = plainloop.Problem(seed=13, scheduler=plainloop.scheduler("unipc"), steps=3, scale=2.0)
    encoder = torch.nn.Linear(4, 4).double()
    raw = torch.randn(2, 4, dtype=torch.float64)

    def run(plain: bool) -> torch.Tensor:
        encoder.zero_grad()
        problem.condition = encoder(raw)
        problem.plain_gradients() if plain else problem.chain_gradients(graph=graph)
        return encoder.weight.grad.clone()

    expected = run(True)
    actual = run(False)
    assert (actual - expected).norm() <= TOLERANCE * expected.norm()


def test_finite_differences_need_no_reference() -> None:
    """The directional derivative of the whole chain by central differences; error O(h^2) + eps / h = 1e-9 at 3e-6."""
    problem = plainloop.Problem(seed=14, scheduler=plainloop.scheduler("unipc"), steps=4, scale=2.0)
    gradients = problem.chain_gradients()
    generator = torch.Generator().manual_seed(0)
    h, slope, ends = 3e-6, 0.0, []
    directions = {
        k: torch.randn(p.shape, generator=generator, dtype=torch.float64) for k, p in problem.net.named_parameters()
    }
    slope = sum(float((gradients[k] * d).sum()) for k, d in directions.items())
    for sign in (1, -1):
        with torch.no_grad():
            for k, p in problem.net.named_parameters():
                p += sign * h * directions[k]
            ends.append(float(problem.loss(problem.sample(gradient="none").latents)))
            for k, p in problem.net.named_parameters():
                p -= sign * h * directions[k]
    assert abs((ends[0] - ends[1]) / (2 * h) - slope) <= 1e-6 * max(1.0, abs(slope))
