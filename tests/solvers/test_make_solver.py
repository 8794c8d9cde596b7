"""Which solver a user gets, what is announced, what is refused, and that the user's scheduler stays as it was."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import schedulerloop as loop
import torch

from prfl_fast.solvers import (
    NonFiniteSchedulerError,
    NonlinearSchedulerError,
    SchedulerSolver,
    Solver,
    SolverTable,
    make_solver,
)

diffusers = pytest.importorskip("diffusers")

KINDS = ["table", "scheduler"]


def dynamic() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def same(a: Solver, b: Solver) -> bool:
    """Equal schedules, and equal results on random input to the last bit."""
    if not (a.timesteps.equal(b.timesteps) and a.sigmas.equal(b.sigmas) and a.start_step == b.start_step):
        return False
    x = torch.randn(2, 3, 4)
    return loop.solver_loop(a, x).equal(loop.solver_loop(b, x))


@pytest.mark.parametrize("name", loop.CASES)
def test_auto_takes_the_table_where_linear(name: str) -> None:
    assert isinstance(make_solver(loop.build(name), 5), SolverTable)


def test_auto_announces_its_fallback() -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=True)
    with pytest.warns(UserWarning, match=r"step 0 of DDIMScheduler is not linear .*\(clip_sample=True\); its own step"):
        solver = make_solver(scheduler, 4, kind="auto")
    assert isinstance(solver, SchedulerSolver)
    with pytest.raises(NonlinearSchedulerError):
        make_solver(scheduler, 4, kind="table")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(make_solver(scheduler, 4, kind="scheduler"), SchedulerSolver)


@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_no_fallback_to_a_scheduler_that_gives_nan(kind: str) -> None:
    with pytest.raises(NonFiniteSchedulerError, match="solver_type"):
        make_solver(diffusers.UniPCMultistepScheduler(solver_type="bh1", **loop.FLOW), 4, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*loop.CASES, *loop.STOCHASTIC])
def test_the_users_scheduler_and_the_random_state_stay_as_they_are(name: str, kind: str) -> None:
    scheduler = loop.build(name)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 3, 4, 4)
    for t in scheduler.timesteps[:2]:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(loop.network(scaled, t), t, x, return_dict=False)[0]
    before, random, numbers = pickle.dumps(vars(scheduler)), torch.get_rng_state(), np.random.get_state()[1].copy()
    solver = make_solver(scheduler, 4, kind=kind)
    x, generator = torch.ones(1, 2, 3, 4), torch.Generator().manual_seed(0)
    loop.solver_loop(solver, x, generator=generator)
    assert torch.get_rng_state().equal(random) and (np.random.get_state()[1] == numbers).all()
    assert pickle.dumps(vars(scheduler)) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [1, 3, 5])
@pytest.mark.parametrize("name", ["unipc3-bh2", "dpm3-flow", "flow-heun", "flow-euler", "pndm", "euler-v"])
def test_a_scheduler_that_ran_before_gives_the_same_solver(name: str, stage: int, kind: str) -> None:
    fresh, stale = loop.build(name), loop.build(name)
    stale.set_timesteps(5)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    for t in stale.timesteps[:stage]:
        scaled = stale.scale_model_input(x, t) if hasattr(stale, "scale_model_input") else x
        x = stale.step(loop.network(scaled, t), t, x, return_dict=False)[0]
    assert same(make_solver(stale, 4, kind=kind), make_solver(fresh, 4, kind=kind))
    # The caller's own timesteps, without the history of that run.
    set_only = loop.build(name)
    set_only.set_timesteps(5)
    assert same(make_solver(stale, None, kind=kind), make_solver(set_only, None, kind=kind))
    assert same(make_solver(stale, None, kind=kind), make_solver(fresh, 5, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_custom_sigmas_and_mu_come_through_none(kind: str) -> None:
    scheduler = dynamic()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.2, 6), mu=0.9)
    solver = make_solver(scheduler, None, kind=kind)
    assert solver.timesteps.equal(scheduler.timesteps)
    assert solver.sigmas.equal(scheduler.sigmas.double()) and solver.num_steps == 6
    x = torch.randn(2, 3, 4)
    expected = x
    for t, a, b in zip(scheduler.timesteps, scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        expected = expected + (b - a) * loop.network(expected, t)
    # Table and formula round the same: one product and one sum, the table's in float64, whence one ulp of 6 steps.
    assert loop.distance(loop.solver_loop(solver, x), expected) <= 6 * 2**-23


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["unipc2-bh2", "dpm2-flow", "flow-euler", "ddim-v", "flow-heun", "euler-epsilon"])
def test_start_step_begins_there_with_no_history(name: str, kind: str) -> None:
    # What an image-to-video pipeline does: set the begin index, run the remaining timesteps.
    start = 2
    scheduler = loop.build(name)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(6)
    if hasattr(own, "set_begin_index"):
        own.set_begin_index(start)
    x = torch.randn(2, 3, 4, 4)
    expected = x
    for t in own.timesteps[start:]:
        scaled = own.scale_model_input(expected, t) if hasattr(own, "scale_model_input") else expected
        expected = own.step(loop.network(scaled, t), t, expected, return_dict=False)[0]
    solver = make_solver(scheduler, 6, start_step=start, kind=kind)
    actual = loop.solver_loop(solver, x)
    if kind == "scheduler":
        assert actual.equal(expected)
    else:
        # 10 evaluations at most, some 4 roundings each by both, on values amplified by Heun's 1 / sigma.
        assert loop.distance(actual, expected) <= 10 * 8 * 2**-24
    with pytest.raises(IndexError, match="i: expected a step in 2.."):
        solver.step(1, solver.initial_state(x), x)


def test_timesteps_cut_by_the_caller() -> None:
    # diffusers' image-to-image: timesteps = scheduler.timesteps[begin:], set_begin_index(begin), latents of that level.
    scheduler, begin = loop.build("flow-euler"), 3
    scheduler.set_timesteps(8)
    whole = make_solver(copy.deepcopy(scheduler), None, start_step=begin)
    scheduler.timesteps = scheduler.timesteps[begin:]
    scheduler.set_begin_index(begin)
    cut = make_solver(scheduler, None)
    assert cut.num_steps == 5 and cut.sigmas.equal(whole.sigmas[begin:])
    x = torch.randn(2, 3)
    assert loop.solver_loop(cut, x).equal(loop.solver_loop(whole, x))


def test_the_begin_index_of_cut_timesteps_counts() -> None:
    scheduler = loop.build("flow-euler")
    scheduler.set_timesteps(8)
    scheduler.timesteps = scheduler.timesteps[3:]
    first = make_solver(scheduler, None)
    scheduler.set_begin_index(3)
    assert not make_solver(scheduler, None).sigmas.equal(first.sigmas)


@pytest.mark.parametrize("kind", KINDS)
def test_later_changes_in_place_do_not_reach_the_solver(kind: str) -> None:
    scheduler = loop.build("unipc2-bh2")
    scheduler.set_timesteps(5)
    solver, x = make_solver(scheduler, None, kind=kind), torch.randn(2, 3)
    before, timesteps = loop.solver_loop(solver, x), solver.timesteps.clone()
    scheduler.sigmas.mul_(0.5)
    scheduler.timesteps.sub_(1)
    assert loop.solver_loop(solver, x).equal(before) and solver.timesteps.equal(timesteps)


@pytest.mark.parametrize("kind", KINDS)
def test_schedules_that_hold_nan(kind: str) -> None:
    # The first of its interpolated sigmas is NaN and never read; it must not look like state that depends on values.
    scheduler = diffusers.KDPM2DiscreteScheduler()
    x = torch.randn(2, 3, 4)
    expected = loop.own_loop(scheduler, 3, x)
    # 5 evaluations, 8 roundings each, on values that 1 / sigma amplifies: sigma goes down to 0.03.
    bound = 0 if kind == "scheduler" else 5 * 8 * 2**-24 * 32
    assert loop.distance(loop.solver_loop(make_solver(scheduler, 3, kind=kind), x), expected) <= bound


def test_known_schedulers_are_not_probed_again() -> None:
    scheduler = loop.build("unipc2-bh2")
    first = make_solver(scheduler, 5)
    assert make_solver(loop.build("unipc2-bh2"), 5) is first
    for other in (
        make_solver(scheduler, 6),
        make_solver(scheduler, 5, start_step=1),
        make_solver(scheduler, 5, kind="scheduler"),
        make_solver(loop.build("unipc3-bh2"), 5),
    ):
        assert other is not first
    assert make_solver(scheduler, 5, kind="table") is first


def test_a_changed_scheduler_is_another() -> None:
    scheduler = loop.build("flow-euler")
    scheduler.set_timesteps(5)
    first = make_solver(scheduler, None)
    scheduler.sigmas[2] += 0.01
    second = make_solver(scheduler, None)
    assert second is not first and float(second.sigmas[2]) == float(scheduler.sigmas[2])
    scheduler.set_shift(5.0)
    third, fourth = make_solver(scheduler, 5), make_solver(loop.build("flow-euler"), 5)
    assert not third.sigmas.equal(fourth.sigmas)


def test_a_changed_step_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = diffusers.FlowMatchEulerDiscreteScheduler
    x = torch.randn(2, 3)
    before = loop.solver_loop(make_solver(kind(), 3), x)
    step = kind.step

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        return tuple(2 * part for part in step(self, *args, **{**kwargs, "return_dict": False}))

    monkeypatch.setattr(kind, "step", doubled)
    assert not loop.solver_loop(make_solver(kind(), 3), x).equal(before)


def test_what_cannot_be_compared_is_probed_each_time() -> None:
    scheduler = loop.build("flow-euler")
    scheduler.note = object()
    assert make_solver(scheduler, 3) is not make_solver(scheduler, 3)


def test_the_kept_solvers_are_few() -> None:
    from prfl_fast.solvers import cache

    for steps in range(2, 2 * cache.LIMIT):
        make_solver(loop.build("flow-euler"), steps)
    assert len(cache._solvers) <= cache.LIMIT


def _unset() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_named(kind: str) -> None:
    scheduler = loop.build("unipc2-bh2")
    for steps in (0, -3, 2.5, True, "4"):
        with pytest.raises(ValueError, match="num_inference_steps: expected a whole number from 1, got"):
            make_solver(scheduler, steps, kind=kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scheduler.set_timesteps has set, but it was never called"):
        make_solver(_unset(), None, kind=kind)
    with pytest.raises(ValueError, match=r"start_step: expected a step in 0..3, got 4"):
        make_solver(scheduler, 4, start_step=4, kind=kind)
    with pytest.raises(ValueError, match=r"set_timesteps refused it \(`mu` must be passed.*num_inference_steps=None"):
        make_solver(dynamic(), 4, kind=kind)
    with pytest.raises(ValueError, match="makes 2 evaluations a step; expected a multiple, got 1"):
        make_solver(loop.build("flow-heun"), 4, start_step=1, kind=kind)
    for wrong in (None, 3, object(), diffusers.DDIMScheduler):
        with pytest.raises(TypeError, match="scheduler: expected an instance of a diffusers scheduler, got"):
            make_solver(wrong, 4, kind=kind)

    class Painting(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, original_image, mask):  # type: ignore[no-untyped-def]
            return (sample,)

    with pytest.raises(TypeError, match="Painting.step needs original_image, mask as well"):
        make_solver(Painting(), 4, kind=kind)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind: expected 'auto', 'table' or 'scheduler', got 'fast'"):
        make_solver(loop.build("flow-euler"), 4, kind="fast")
