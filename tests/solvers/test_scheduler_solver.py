"""The scheduler's own step in the graph: bit for bit its own loop, and its gradients are autograd's."""

from __future__ import annotations

from typing import Any

import pytest
import schedulerloop as loop
import torch

from prfl_fast.solvers import NonFiniteSchedulerError, NonlinearSchedulerError, SchedulerSolver, SolverTable

pytest.importorskip("diffusers")

STEPS = 6
CLIPPED = ("DDIMScheduler", {"clip_sample": True})
THRESHOLDED = ("UniPCMultistepScheduler", {"thresholding": True})


def nonlinear(case: tuple[str, dict[str, Any]]) -> Any:
    import diffusers

    return getattr(diffusers, case[0])(**case[1])


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", loop.CASES)
def test_bit_for_bit_the_own_loop(name: str, output: torch.dtype) -> None:
    scheduler = loop.build(name)
    solver = SchedulerSolver(scheduler, STEPS)
    x = torch.randn(2, 3, 2, 5, 4).transpose(-1, -2)
    expected = loop.own_loop(scheduler, STEPS, x, output_dtype=output)
    actual = loop.solver_loop(solver, x, output_dtype=output)
    assert actual.dtype == expected.dtype and actual.equal(expected)
    assert not solver.linear


@pytest.mark.parametrize("case", [CLIPPED, THRESHOLDED], ids=["clip", "threshold"])
def test_nonlinear_steps_run_bit_for_bit(case: tuple[str, dict[str, Any]]) -> None:
    scheduler = nonlinear(case)
    x = 3 * torch.randn(2, 3, 4, 4)
    expected = loop.own_loop(scheduler, STEPS, x)
    assert loop.solver_loop(SchedulerSolver(scheduler, STEPS), x).equal(expected)


def test_steps_run_in_any_order_and_again() -> None:
    solver = SchedulerSolver(loop.build("unipc3-bh2"), STEPS)
    x, m = torch.randn(2, 3, 4), torch.randn(STEPS, 2, 3, 4)
    states = [solver.initial_state(x)]
    for i in range(STEPS):
        states.append(solver.step(i, states[-1], m[i]))
    for i in (4, 1, 5, 0, 0, 3):
        again = solver.step(i, states[i], m[i])
        assert all(a.equal(b) for a, b in zip(again, states[i + 1], strict=True))


@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 2, 3, 4), (3, 2, 1, 2, 2)])
def test_any_shape_of_latents(shape: tuple[int, ...]) -> None:
    scheduler = loop.build("unipc2-bh2")
    x = torch.randn(shape)
    assert loop.solver_loop(SchedulerSolver(scheduler, 4), x).equal(loop.own_loop(scheduler, 4, x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", [CLIPPED, THRESHOLDED, loop.CASES["unipc3-bh2"], loop.CASES["heun"]])
def test_pullback_is_autograd_of_the_step(case: tuple[str, dict[str, Any]], masked: bool) -> None:
    solver = SchedulerSolver(nonlinear(case), STEPS)
    mask = torch.rand(2, 1, 4) < 0.5 if masked else None
    state = solver.initial_state(2 * torch.randn(2, 3, 4, dtype=torch.float64))
    for i in range(solver.num_steps):
        leaves = tuple(z.detach().requires_grad_() for z in state)
        m = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        out = solver.step(i, leaves, m, (), mask)
        w = [torch.randn_like(z) for z in out]
        loss = sum((a * b).sum() for a, b in zip(out, w, strict=True))
        expected = torch.autograd.grad(loss, (*leaves, m), allow_unused=True)
        into_state, (into_m,) = solver.pullback(i, leaves, m, (), w, mask)
        for actual, wanted in zip((*into_state, into_m), expected, strict=True):
            assert (actual is None) == (wanted is None)
            # The sum over outputs is taken in another order: 4 terms of 2^-53.
            assert wanted is None or torch.allclose(actual, wanted, rtol=1e-14, atol=1e-14)
        assert all(leaf.grad is None for leaf in leaves)
        state = tuple(z.detach() for z in out)


def test_gradient_through_a_clipped_chain_by_finite_differences() -> None:
    # Central differences of a piecewise smooth function: O(h^2) + 2^-53 / h = 1e-9 at 3e-6, the kinks aside.
    solver = SchedulerSolver(nonlinear(CLIPPED), 4)
    x = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    direction, h = torch.randn_like(x), 3e-6
    (gradient,) = torch.autograd.grad(loop.solver_loop(solver, x).square().sum(), x)
    with torch.no_grad():
        high, low = (loop.solver_loop(solver, x + s * h * direction).square().sum() for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(high - low) / (2 * h), rel=1e-6, abs=1e-7)


def test_the_mask_holds_the_latents_and_nothing_else() -> None:
    solver = SchedulerSolver(loop.build("unipc2-bh2"), STEPS)
    x, m, mask = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(1, 3, 4) < 0.5
    free = solver.step(0, (x,), m)
    for given in (mask, mask.float()):
        held = solver.step(0, (x,), m, latent_mask=given)
        assert held[0].equal(torch.where(mask, free[0], x)) and not held[0].equal(free[0])
        assert all(a.equal(b) for a, b in zip(free[1:], held[1:], strict=True))
    # Held elements pass their cotangent on to x as it is, and none to the network.
    g = torch.randn(2, 3, 4)
    (into_x,), (into_m,) = solver.pullback(0, (x,), m, (), [g], torch.zeros(1, 1, 4))
    assert into_x is not None and into_x.equal(g)
    assert into_m is None or not into_m.any()


def test_missing_cotangents_are_zero() -> None:
    solver = SchedulerSolver(loop.build("unipc2-bh2"), STEPS)
    x, m = torch.randn(2, 3), torch.randn(2, 3)
    state = solver.step(0, solver.initial_state(x), m)
    g = torch.randn(2, 3)
    short = solver.pullback(1, state, m, (), [g])
    full = solver.pullback(1, state, m, (), [g, *([None] * 3)])
    assert all((a is None) == (b is None) for a, b in zip(short[0], full[0], strict=True))
    (short_m,), (full_m,) = short[1], full[1]
    assert short_m is not None and full_m is not None and short_m.equal(full_m)
    into_state, into_outputs = solver.pullback(1, state, m, (), [g], output_dtypes=())
    assert into_outputs == () and into_state[0] is not None and into_state[0].equal(full[0][0])
    (narrow_m,) = solver.pullback(1, state, m, (), [g], output_dtypes=(torch.bfloat16,))[1]
    assert narrow_m is not None and narrow_m.equal(full_m.bfloat16())
    assert solver.pullback(1, state, m, (), [None]) == ((None,) * len(state), (None,))


def test_keeps_no_tensor_of_a_run_alive() -> None:
    import gc
    import weakref

    solver = SchedulerSolver(loop.build("unipc3-bh2"), STEPS)
    x = torch.randn(2, 3, requires_grad=True)
    state, seen = solver.initial_state(x), []
    for i in range(STEPS):
        m = loop.network(solver.scale_input(i, state[0]), solver.timesteps[i])
        state = solver.step(i, state, m)
        seen += [weakref.ref(tensor) for tensor in (m, *state)]
    del m, state
    gc.collect()
    # UniPC keeps the very first latents, which are ours, as its last sample.
    assert not [ref for ref in seen if ref() is not None and ref() is not x]


def test_wrong_calls_are_refused() -> None:
    solver = SchedulerSolver(loop.build("unipc2-bh2"), STEPS)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="state: expected 1 tensors before step 0, got 2"):
        solver.step(0, (x, x), x)
    with pytest.raises(ValueError, match="unconditional: expected None, the scheduler's own step takes one output"):
        solver.step(0, (x,), x, unconditional=x)
    with pytest.raises(ValueError, match="output_dtypes: expected at most one, as the step had, got 2"):
        solver.pullback(0, (x,), x, (), [x], output_dtypes=(x.dtype, x.dtype))
    with pytest.raises(ValueError, match="its adjoint depends on values"):
        solver.pullback(0, None, None, (), [x])
    with pytest.raises(ValueError, match="noise: step 0 draws 0 tensors, got 1"):
        solver.step(0, (x,), x, (x,))
    with pytest.raises(ValueError, match="cotangents: expected at most"):
        solver.pullback(0, (x,), x, (), [x] * 9)
    with pytest.raises(IndexError, match="expected a step in 0..5, got 6"):
        solver.step(6, (x,), x)


def test_the_denoised_prediction_is_the_tables() -> None:
    for name in loop.CASES:
        solver, table = SchedulerSolver(loop.build(name), 5), SolverTable.from_scheduler(loop.build(name), 5)
        for i in range(5):
            assert solver.original_coefficients(i) == pytest.approx(table.original_coefficients(i), rel=1e-12)


def test_state_that_cannot_be_repeated_is_refused() -> None:
    import diffusers

    class Adaptive(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):  # type: ignore[no-untyped-def]
            self.largest = float(sample.abs().max())
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    with pytest.raises(NonlinearSchedulerError, match="keeps 'largest'.*can't be repeated"):
        SchedulerSolver(Adaptive(), 4)
    bh1 = diffusers.UniPCMultistepScheduler(solver_type="bh1", **loop.FLOW)
    with pytest.raises(NonFiniteSchedulerError, match="NaN or infinity in step 3 of 4"):
        SchedulerSolver(bh1, 4)
