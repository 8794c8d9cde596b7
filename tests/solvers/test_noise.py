"""Schedulers that draw noise: the draws become inputs of the step, with the scheduler's own random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import schedulerloop as loop
import torch

from prfl_fast.solvers import SchedulerSolver, SolverTable, make_solver

diffusers = pytest.importorskip("diffusers")

STEPS = 6


def seeded(count: int | None = None) -> Any:
    generators = [torch.Generator().manual_seed(7 + k) for k in range(count or 1)]
    return generators if count else generators[0]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", loop.STOCHASTIC)
def test_own_step_bit_for_bit_with_the_same_generator(name: str, per_sample: bool) -> None:
    scheduler = loop.build(name)
    x = torch.randn(3, 2, 4, 4)
    expected = loop.own_loop(scheduler, STEPS, x, generator=seeded(3 if per_sample else None))
    actual = loop.solver_loop(SchedulerSolver(scheduler, STEPS), x, generator=seeded(3 if per_sample else None))
    assert actual.equal(expected)


@pytest.mark.parametrize("name", loop.STOCHASTIC)
def test_float64_table_equals_the_own_loop_given_its_noise(name: str) -> None:
    # The bound of test_table. DPM-Solver draws in float32 and multiplies its draws by float32 numbers in that dtype:
    # 4 roundings of 2^-24 a step.
    scheduler = loop.build(name)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with loop.without_rounding():
        expected = loop.own_loop(scheduler, STEPS, x, generator=seeded())
        actual = loop.solver_loop(SolverTable.from_scheduler(scheduler, STEPS), x, generator=seeded())
    assert loop.distance(actual, expected) <= (STEPS * 4 * 2**-24 if name == "dpm-sde" else 1e-12)


@pytest.mark.parametrize("name", loop.STOCHASTIC)
def test_float32_table_equals_the_own_loop_to_rounding(name: str) -> None:
    # 6 steps, some 8 roundings of 2^-24 each on values of the latents' size.
    scheduler = loop.build(name)
    x = torch.randn(2, 3, 4, 4)
    expected = loop.own_loop(scheduler, STEPS, x, generator=seeded())
    actual = loop.solver_loop(SolverTable.from_scheduler(scheduler, STEPS), x, generator=seeded())
    assert loop.distance(actual, expected) <= STEPS * 8 * 2**-24
    other = loop.solver_loop(
        SolverTable.from_scheduler(scheduler, STEPS), x, generator=torch.Generator().manual_seed(1)
    )
    assert loop.distance(other, expected) > 1e-2


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", loop.STOCHASTIC)
def test_draws_have_the_dtype_that_the_scheduler_draws_in(name: str, output: torch.dtype) -> None:
    scheduler = loop.build(name)
    x = torch.randn(2, 3, 4, 4)
    expected = loop.own_loop(scheduler, STEPS, x, generator=seeded(), output_dtype=output)
    actual = loop.solver_loop(SchedulerSolver(scheduler, STEPS), x, generator=seeded(), output_dtype=output)
    assert actual.equal(expected)


@pytest.mark.parametrize("kind", ["table", "scheduler"])
def test_the_global_generator_is_used_as_the_scheduler_uses_it(kind: str) -> None:
    scheduler = loop.build("euler-ancestral")
    solver = make_solver(scheduler, STEPS, kind=kind)
    x = torch.randn(2, 3, 4)
    torch.manual_seed(3)
    expected = loop.own_loop(scheduler, STEPS, x)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    actual = loop.solver_loop(solver, x)
    assert torch.get_rng_state().equal(after)
    assert loop.distance(actual, expected) <= (0 if kind == "scheduler" else STEPS * 8 * 2**-24)


@pytest.mark.parametrize("kind", ["table", "scheduler"])
def test_wrong_noise_is_refused(kind: str) -> None:
    solver = make_solver(loop.build("euler-ancestral"), STEPS, kind=kind)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="noise: "):
        solver.step(0, (x,), x)
    with pytest.raises(ValueError, match=r"noise: expected .*shape \(2, 3\).*, got \(3, 2\)"):
        solver.step(0, (x,), x, (x.T.contiguous(),))
    with pytest.raises(ValueError, match=r"generator: expected one per sample \(2\), got 3"):
        solver.draw_noise(0, x, seeded(3))


def test_deterministic_schedulers_draw_nothing() -> None:
    state = torch.get_rng_state()
    for name in ("unipc2-bh2", "flow-euler", "ddim-v"):
        for kind in ("table", "scheduler"):
            assert make_solver(loop.build(name), 3, kind=kind).draw_noise(0, torch.randn(2, 3), None) == ()
            torch.set_rng_state(state)


def test_noise_has_no_influence_on_the_adjoint() -> None:
    scheduler = loop.build("euler-ancestral")
    table, own = (make_solver(scheduler, STEPS, kind=kind) for kind in ("table", "scheduler"))
    x, m, g = (torch.randn(2, 3) for _ in range(3))
    noise = own.draw_noise(1, x, seeded())
    (into_x,), (into_m,) = table.pullback(1, None, None, (), [g])
    (own_x,), (own_m,) = own.pullback(1, (x,), m, noise, [g])
    assert into_x is not None and into_m is not None and own_x is not None and own_m is not None
    # One coefficient each; the scheduler's autograd rounds some 8 times.
    assert loop.distance(into_x, own_x) <= 8 * 2**-24 and loop.distance(into_m, own_m) <= 8 * 2**-24


def test_another_kind_of_draw_is_refused() -> None:
    class Uniform(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):  # type: ignore[no-untyped-def]
            return super().step(model_output, timestep, sample + torch.rand_like(sample), return_dict=return_dict)

    with pytest.raises(ValueError, match="scheduler: its step draws by rand_like; only standard normal draws"):
        make_solver(Uniform(), 3)
