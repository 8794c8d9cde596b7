"""Network calls, taps, modes' draws, the guard, faults, refusals: what HOUSE's semantics promise, one test each."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import plainloop
import pytest
import torch

import prfl_fast

pytest.importorskip("diffusers")
STEPS = 5


def make(scale: float = 2.0, scheduler: str = "unipc", **arguments: Any) -> plainloop.Problem:
    arguments = {"seed": 1, "steps": STEPS, **arguments}
    return plainloop.Problem(scheduler=plainloop.scheduler(scheduler), scale=scale, **arguments)


def count_calls(problem: plainloop.Problem, **arguments: Any) -> int:
    problem.net.calls = 0
    problem.chain_gradients(**arguments)
    return problem.net.calls


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_number_of_network_calls(scale: float, graph: str) -> None:
    problem = make(scale)
    branches = 1 if scale == 1 else 2
    c = STEPS * branches
    assert count_calls(problem, graph=graph) == 2 * c - 1
    assert count_calls(problem, graph=graph, gradient="none" if graph == "none" else "last:1") == c + branches - 1
    assert count_calls(problem, graph=graph, gradient="step:1") == c + branches - 1
    assert count_calls(problem, graph=graph, gradient="step:1", stop_step=2) == 2 * branches + branches - 1
    assert count_calls(problem, graph=graph, gradient="last:3") == c + 3 * branches - 1
    assert count_calls(problem, graph=graph, supervise=(2, 3, 5)) == 2 * c - 1
    if scale != 1:
        # The unconditional branch is a constant: one recomputation less in every step.
        assert count_calls(problem, graph=graph, guidance_gradient="conditional") == c + STEPS - 1


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_last_one_with_taps_costs_one_call_more_for_each_earlier_tap(graph: str) -> None:
    problem = make(1.0)
    assert count_calls(problem, graph=graph, gradient="last:1", supervise=(2, 4, 5)) == STEPS + 3 - 1


def test_no_gradient_no_graph_and_no_extra_call() -> None:
    problem = make()
    sample = problem.sample(gradient="none")
    assert problem.net.calls == 2 * STEPS and not sample.latents.requires_grad or problem.latents.requires_grad
    with torch.no_grad():
        assert not problem.sample(gradient="none").latents.requires_grad
        with pytest.raises(RuntimeError, match="switched off"):
            problem.sample()


def test_prfl_draws_the_step_and_ends_there() -> None:
    problem = make(1.0)
    seen = set()
    for seed in range(30):
        sample = problem.sample(gradient="prfl", generator=torch.Generator().manual_seed(seed))
        again = problem.sample(gradient="prfl", generator=torch.Generator().manual_seed(seed))
        assert sample.step == again.step and torch.equal(sample.latents, again.latents)
        seen.add(sample.step)
        problem.loss(sample.latents).backward()
        norms = sample.gradient_norms
        assert norms.shape == (STEPS,) and torch.isfinite(norms).nonzero().flatten().tolist() == [sample.step - 1]
    assert seen == set(range(1, STEPS + 1))


def test_taps_tell_the_next_timestep_and_noise_level() -> None:
    problem = make(1.0, "unipc")
    reference = copy.deepcopy(problem.scheduler)
    reference.set_timesteps(STEPS)
    sample = problem.sample(supervise=(2, 5))
    first, last = sample.taps
    assert first.step == 2 and float(first.timestep) == float(reference.timesteps[2])
    assert abs(first.sigma - float(reference.sigmas[2])) < 1e-6
    assert last.step == 5 and float(last.timestep) == 0 and abs(last.sigma) < 1e-6
    assert sample.latents is last.latents and sample.step == 5
    whole = problem.sample(stop_step=2)
    assert torch.equal(whole.latents, first.latents)


def test_start_step_is_the_rest_of_the_chain_of_a_one_step_solver() -> None:
    problem = make(1.0, "euler")
    with torch.no_grad():
        half = problem.sample(stop_step=2, gradient="none")
        whole = problem.sample(gradient="none")
        problem.latents = half.latents
        rest = problem.sample(start_step=2, gradient="none")
    assert torch.equal(rest.latents, whole.latents)


def test_pred_original_sample_of_a_flow_is_x_minus_sigma_v() -> None:
    problem = make(1.0, "euler")
    sample = problem.sample(stop_step=3)
    with torch.no_grad():
        before = problem.sample(stop_step=2, gradient="none")
        velocity = problem.net(before.latents, before.timestep, problem.condition)
        expected = before.latents - before.sigma * velocity
    assert torch.allclose(sample.pred_original_sample, expected, rtol=1e-6, atol=1e-6)
    assert sample.pred_original_sample.requires_grad


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_latent_mask_and_prepare_input(graph: str) -> None:
    problem = make(1.0)
    mask = torch.tensor([True, False, True]).reshape(1, 3, 1, 1, 1)
    seen = []

    def prepare(x: torch.Tensor, t: torch.Tensor, step: int) -> dict[str, Any]:
        seen.append(step)
        return {"c": problem.condition + x.mean()}

    sample = problem.sample(latent_mask=mask, prepare_input=prepare, graph=graph)
    assert torch.equal(sample.latents[:, 1], problem.latents[:, 1])
    assert not torch.equal(sample.latents[:, 0], problem.latents[:, 0])
    problem.loss(sample.latents).backward()
    if graph == "steps":
        sample.backward()
    assert seen[:STEPS] == list(range(STEPS)) and len(seen) == 2 * STEPS - 1
    # Masked elements never move; their gradient is that of the loss plus what flows through the network's input.
    assert torch.isfinite(problem.latents.grad).all()


def test_guidance_function_and_scale_by_step() -> None:
    problem = make(3.0)
    expected = problem.chain_gradients()
    problem.scale = 2.0
    actual = problem.chain_gradients(guidance_fn=lambda c, u, step: u + 3.0 * (c - u))
    plainloop.assert_same(actual, expected, 1e-12)
    calls: list[int] = []
    problem.net.calls = 0
    sample = prfl_fast.unrolled_sample(
        problem.net,
        problem.scheduler,
        problem.latents,
        STEPS,
        conditioning=lambda step, t: {"c": problem.condition * (step + 1)},
        negative_conditioning={"c": problem.negative},
        guidance_scale=lambda step: calls.append(step) or (1.0 if step % 2 else 4.0),
    )
    assert problem.net.calls == STEPS + 3 and calls == list(range(STEPS)) and sample.step == STEPS


def test_two_experts_change_at_the_boundary() -> None:
    high, low = make(1.0), make(1.0, seed=2)
    sample = prfl_fast.unrolled_sample(
        high.net,
        high.scheduler,
        high.latents,
        STEPS,
        conditioning={"c": high.condition},
        transformer_2=low.net,
        boundary_ratio=0.6,
    )
    timesteps = copy.deepcopy(high.scheduler)
    timesteps.set_timesteps(STEPS)
    above = int((timesteps.timesteps >= 600).sum())
    assert 0 < above < STEPS and (high.net.calls, low.net.calls) == (above, STEPS - above)
    high.loss(sample.latents).backward()
    assert all(p.grad is not None for net in (high.net, low.net) for p in net.parameters())


# The guard


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("change", ["weight", "train", "freeze", "scaling"])
def test_a_model_that_changed_is_noticed(change: str, graph: str) -> None:
    problem = make()
    problem.net.blocks[0].scaling = {"default": 1.0}
    sample = problem.sample(graph=graph)
    loss = problem.loss(sample.latents)
    if change == "weight":
        with torch.no_grad():
            problem.net.last.weight.mul_(1.1)
    elif change == "train":
        problem.net.eval()
    elif change == "freeze":
        problem.net.last.weight.requires_grad_(False)
    else:
        problem.net.blocks[0].scaling = {"default": 0.5}
    with pytest.raises(prfl_fast.ModelChangedError, match="changed between sampling and backward"):
        loss.backward()
        sample.backward()


def test_create_graph_is_refused() -> None:
    problem = make()
    loss = problem.loss(problem.sample().latents)
    with pytest.raises(RuntimeError, match="create_graph=True is unsupported"):
        torch.autograd.grad(loss, list(problem.net.parameters()), create_graph=True)


# Faults


def same(a: Any, b: Any) -> bool:
    """Equality that goes into tensors and containers."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


class Boom(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@pytest.mark.parametrize("graph", ["chain", "steps"])
@pytest.mark.parametrize("error", [Boom, RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_fault_in_any_call_leaves_everything_as_it_was(
    graph: str, error: type[BaseException], accumulated: bool
) -> None:
    problem = make()
    expected = problem.chain_gradients(graph=graph)
    total = problem.net.calls
    state = copy.deepcopy(problem.scheduler.__dict__)
    for call in range(1, total + 1):
        problem.clear()
        if accumulated:
            for p in problem.net.parameters():
                p.grad = torch.ones_like(p)
        own = [p.grad for p in problem.net.parameters()]
        problem.net.calls = 0

        def hook(module: Any, inputs: Any, call: int = call) -> None:
            if module.calls + 1 == call:
                raise error("injected")

        handle = problem.net.register_forward_pre_hook(hook)
        with pytest.raises(error, match="injected"):
            sample = problem.sample(graph=graph)
            problem.loss(sample.latents).backward()
            sample.backward()
        handle.remove()
        now = [p.grad for p in problem.net.parameters()]
        assert all(a is b for a, b in zip(now, own, strict=True)), f"call {call}"
        assert all(g is None or bool((g == 1).all()) for g in now), f"call {call}"
        assert not any(m._forward_hooks for m in problem.net.modules())
        assert same(problem.scheduler.__dict__, state)
    plainloop.assert_same(problem.chain_gradients(graph=graph), expected, 0.0)


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_nonfinite_values_are_named(graph: str) -> None:
    problem = make()

    def poison(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if problem.net.calls == 2 * 2 + 2 else output

    handle = problem.net.blocks[1].register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=r"step 2, unconditional branch"):
        problem.sample(graph=graph, detect_nonfinite=True)
    handle.remove()
    problem.net.calls = 0

    def poison_gradient(module: Any, inputs: Any, output: torch.Tensor) -> None:
        # A checkpoint's backward walks the forward's own nodes: hooks on recomputed tensors would never fire.
        if problem.net.calls == 1:
            output.register_hook(lambda g: g * float("inf"))

    problem.net.last.register_forward_hook(poison_gradient)
    sample = problem.sample(graph=graph, detect_nonfinite=True)
    with pytest.raises(FloatingPointError, match=r"step 0, .* backward"):
        problem.loss(sample.latents).backward()
        sample.backward()
    assert all(p.grad is None for p in problem.net.parameters())


def test_an_impure_network_is_found_out() -> None:
    problem = make(1.0)
    problem.chain_gradients(verify_recompute=True)

    def impure(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 1e-9 * problem.net.calls)

    problem.net.register_forward_hook(impure)
    with pytest.raises(RuntimeError, match=r"step 3, conditional branch.*other bits"):
        problem.chain_gradients(verify_recompute=True)


def test_nothing_is_left_behind() -> None:
    problem = make()
    sample = problem.sample()
    problem.loss(sample.latents).backward()
    dead = weakref.ref(sample)
    del sample
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"gradient": "lasst:2"}, ValueError, "gradient: unknown mode 'lasst:2'"),
        ({"gradient": "last:9"}, ValueError, "must be in 1..5"),
        ({"gradient": "last:x"}, ValueError, "whole number"),
        ({"gradient": 3}, TypeError, "gradient: expected a string"),
        ({"graph": "tree"}, ValueError, "graph: expected one of"),
        ({"solver": "magic"}, ValueError, "solver: expected one of"),
        ({"stop_step": 9}, ValueError, "stop_step: expected a whole number in 1..5"),
        ({"start_step": -1}, ValueError, "start_step"),
        ({"supervise": (3, 2)}, ValueError, "supervise: expected ascending"),
        ({"supervise": (2,), "stop_step": 3}, ValueError, "one of the two"),
        ({"supervise": (2,), "gradient": "prfl"}, ValueError, "can't be given supervise"),
        ({"boundary_ratio": 0.5}, ValueError, "expected both or none"),
        ({"guidance_gradient": "none"}, ValueError, "guidance_gradient"),
        ({"latent_mask": torch.ones(7)}, ValueError, "latent_mask"),
        ({"generator": 3}, TypeError, "generator"),
        ({"memory_budget": "lots"}, ValueError, "memory_budget"),
    ],
)
def test_bad_arguments_are_refused_before_any_call(
    arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    problem = make()
    with pytest.raises(error, match=text):
        problem.sample(**arguments)
    assert problem.net.calls == 0


def test_bad_latents_model_and_scheduler() -> None:
    problem = make(1.0)
    keywords = {"conditioning": {"c": problem.condition}}
    good = problem.latents.detach()
    for latents, error, text in [
        (good.clone().fill_(float("nan")), ValueError, "latents: expected finite"),
        (good.long(), TypeError, "latents: expected a float"),
        (good[:0], ValueError, "latents: expected at least one"),
        ([1.0], TypeError, "latents: expected a tensor"),
    ]:
        with pytest.raises(error, match=text):
            prfl_fast.unrolled_sample(problem.net, problem.scheduler, latents, STEPS, **keywords)
    with pytest.raises(TypeError, match="scheduler: expected a diffusers scheduler"):
        prfl_fast.unrolled_sample(problem.net, None, good, STEPS, **keywords)
    with pytest.raises(TypeError, match="transformer: expected"):
        prfl_fast.unrolled_sample(None, problem.scheduler, good, STEPS, **keywords)
    with pytest.raises(ValueError, match="guidance_scale: 2.0 needs negative_conditioning"):
        prfl_fast.unrolled_sample(problem.net, problem.scheduler, good, STEPS, guidance_scale=2.0, **keywords)
    problem.net.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing requires a gradient"):
        prfl_fast.unrolled_sample(
            problem.net, problem.scheduler, good, STEPS, conditioning={"c": problem.condition.detach()}
        )
    assert problem.net.calls == 0
