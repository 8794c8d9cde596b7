"""Every scheduler of diffusers, in every listed configuration, against its own loop: output, gradients and noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import schedulerloop as loop
import schedulertable as table
import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.solvers import SchedulerSolver, SolverTable

diffusers = pytest.importorskip("diffusers")

STEPS = 5
LINEAR = [name for name, case in table.CASES.items() if case.linear]
NONLINEAR = [name for name, case in table.CASES.items() if not case.linear]

# torchsde says so where a tree is asked beyond its ends, which CosineDPMSolver does in its last step.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]")

# IPNDM divides by its first alpha, the root of one rounding of float32, 2^-12 (and by its square in the latents'
# gradient): 64 roundings of 2^-53.
ILL_CONDITIONED = {"IPNDMScheduler": 2.0**-53 * 2.0**24 * 64}


class SmoothNet(nn.Module):
    """Of every element of a sample and of time; smooth, bounded slope, float64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width + 1, 7, dtype=torch.float64)
        self.last = nn.Linear(7, width, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        time = (t.double() / 1000).reshape(-1, 1).expand(len(x), 1)
        return self.last(torch.tanh(self.first(torch.cat([0.3 * x.flatten(1), time], 1)))).reshape(x.shape)


def built(name: str, steps: int = STEPS) -> tuple[Any, int | None]:
    case = table.CASES[name]
    found(case.kind)
    return case.prepared(steps)


def found(kind: str) -> Any:
    """The class; skips where this diffusers has none, or a dummy for want of torchsde."""
    if not hasattr(diffusers.schedulers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    found = getattr(diffusers.schedulers, kind)
    if not issubclass(found, diffusers.SchedulerMixin):
        pytest.importorskip("torchsde")
    return found


def start(scheduler: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 1, 2, dtype=dtype) * float(getattr(scheduler, "init_noise_sigma", 1.0))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def differentiated(run: Callable[[Tensor], Tensor], net: nn.Module, x: Tensor) -> list[Tensor]:
    """Final latents, then the gradients of a loss on them: initial latents and every parameter."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    latents = run(x)
    weights = torch.linspace(-1, 1, latents.numel(), dtype=latents.dtype).reshape(latents.shape)
    ((weights * latents).sum() + latents.square().sum() / 2).backward()
    assert x.grad is not None
    return [latents.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def furthest(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative distance; of gradients, relative to the largest one's norm where they are far smaller."""
    assert len(actual) == len(expected)
    scale = 1e-3 * max(float(e.norm()) for e in expected[1:])
    sizes = [float(expected[0].norm()), *(max(float(e.norm()), scale) for e in expected[1:])]
    return max(float((a - e).norm()) / size for a, e, size in zip(actual, expected, sizes, strict=True))


def rounded_loop(solver: SolverTable, net: nn.Module, x: Tensor, generator: torch.Generator) -> Tensor:
    """The table's chain with latents and network output rounded to float32 in every step."""

    def rounded(value: Tensor) -> Tensor:
        return value + (value.float().double() - value).detach()

    state = solver.initial_state(x)
    for i in range(solver.num_steps):
        noise = solver.draw_noise(i, state[0], generator)
        output = net(solver.scale_input(i, state[0]), solver.timesteps[i])
        new, *history = solver.step(i, (rounded(state[0]), *state[1:]), rounded(output), noise)
        state = (rounded(new), *(rounded(entry) for entry in history))
    return state[0]


@pytest.mark.parametrize("name", LINEAR)
def test_the_table_chain_is_the_own_loop_with_its_gradients(name: str) -> None:
    """10 steps of some 20 float64 roundings stay near 1e-13, times the condition of a chain that starts at sigma 157.

    Schedulers that round to float32 inside are met to 1e-10 without that rounding. As they are they are met within 16
    times what one rounding of latents, output and history in each step does: they make at most eight, in other places.
    """
    scheduler, steps = built(name)
    x, net = start(scheduler), SmoothNet(6)

    def chain(latents: Tensor) -> Tensor:
        sample = prfl_fast.unrolled_sample(net, scheduler, latents, steps, solver="table", generator=seeded())
        return sample.latents

    def own(latents: Tensor) -> Tensor:
        return loop.own_loop(scheduler, steps, latents, net, generator=seeded())

    actual, plain = differentiated(chain, net, x), differentiated(own, net, x)
    assert all(bool(value.isfinite().all()) for value in plain)
    distance = furthest(actual, plain)
    if distance <= ILL_CONDITIONED.get(table.CASES[name].kind, 1e-10):
        return
    solver = SolverTable.from_scheduler(scheduler, steps)
    once = differentiated(lambda latents: rounded_loop(solver, net, latents, seeded()), net, x)
    assert distance <= 16 * furthest(once, actual)
    with loop.without_rounding():
        # Whatever it would draw in float32 on its way there is drawn in float64 now, by both.
        solver = SolverTable.from_scheduler(scheduler, steps)
        if any(d.dtype == torch.float32 for d in solver.draw_noise(solver.start_step, x, seeded())):
            return  # and what it draws in float32 all the same it also scales in float32
        exact = differentiated(lambda z: loop.solver_loop(solver, z, net, generator=seeded()), net, x)
        assert furthest(exact, differentiated(own, net, x)) <= 1e-10


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", table.CASES)
def test_own_step_and_own_noise_to_the_last_bit(name: str, per_sample: bool) -> None:
    scheduler, steps = built(name)
    if per_sample and "generator" not in inspect.signature(scheduler.step).parameters:
        pytest.skip("its step takes no generator")
    x = start(scheduler, torch.float32)

    def generator() -> Any:
        return [torch.Generator().manual_seed(5 + k) for k in range(2)] if per_sample else seeded()

    expected = loop.own_loop(scheduler, steps, x, generator=generator())
    actual = loop.solver_loop(SchedulerSolver(scheduler, steps), x, generator=generator())
    assert actual.equal(expected) and bool(expected.isfinite().all())


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_settings_keep_their_step_in_the_graph(name: str) -> None:
    scheduler, steps = built(name)
    x, net = start(scheduler), SmoothNet(6)

    def chain(latents: Tensor) -> Tensor:
        sample = prfl_fast.unrolled_sample(net, scheduler, latents, steps, generator=seeded())
        return sample.latents

    with pytest.warns(UserWarning, match=f"of {table.CASES[name].kind} is not linear .*its own step is kept"):
        actual = differentiated(chain, net, x)
    plain = differentiated(lambda z: loop.own_loop(scheduler, steps, z, net, generator=seeded()), net, x)
    assert actual[0].equal(plain[0])
    # The same operations on the same values; cotangents are summed in another order.
    assert furthest(actual, plain) <= 1e-12


def _exported() -> dict[str, type]:
    """Scheduler classes of the installed diffusers; those of a missing dependency stand there as dummies."""
    from diffusers import schedulers

    found = {name: getattr(schedulers, name) for name in dir(schedulers)}
    return {
        name: kind
        for name, kind in found.items()
        if inspect.isclass(kind)
        and not name.startswith("Flax")
        and name != "SchedulerMixin"
        and (name.endswith("Scheduler") or issubclass(kind, diffusers.SchedulerMixin))
    }


def test_every_class_is_listed() -> None:
    listed = table.SUPPORTED.keys() | table.REFUSED.keys()
    missing = sorted(_exported().keys() - listed)
    assert not missing, (
        f"diffusers {diffusers.__version__} exports {', '.join(missing)}: give each its configurations in SUPPORTED of "
        "tests/schedulertable.py, or its reason in REFUSED of prfl_fast/solvers/refused.py"
    )
    assert not table.SUPPORTED.keys() & table.REFUSED.keys()
    gone = sorted(listed - _exported().keys())
    # Older versions lack some; the one that the table was made for has them all.
    assert not (gone and diffusers.__version__.startswith(table.MADE_FOR)), f"no such classes: {', '.join(gone)}"
    assert len(LINEAR) >= 60


def _refused(scheduler: Any, message: str, error: type[Exception] = TypeError, steps: int = 6) -> None:
    net = SmoothNet(6)
    generator = None if message.startswith("generator") else seeded()
    for solver in ("auto", "table", "scheduler"):
        with pytest.raises(error, match=message):
            prfl_fast.unrolled_sample(
                net, scheduler, torch.randn(2, 3, 1, 2), steps, solver=solver, generator=generator
            )
    assert net.calls == 0


@pytest.mark.parametrize("kind", table.REFUSED)
def test_refused_by_name_and_reason_before_any_network_call(kind: str) -> None:
    needed, message = table.REFUSED[kind]
    _refused(found(kind)(**needed), f"scheduler: {kind} is not supported: .*{message}")


@pytest.mark.parametrize(("kind", "settings", "error", "message"), table.UNUSABLE)
def test_settings_that_cannot_sample_are_refused(
    kind: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    _refused(found(kind)(**settings), message, error)


def test_a_subclass_with_a_step_of_its_own_is_another_scheduler() -> None:
    class Rewritten(diffusers.KarrasVeScheduler):
        def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor]:
            return (0.5 * sample + 0.25 * model_output,)

    class Inherited(diffusers.KarrasVeScheduler):
        pass

    solver = SolverTable.from_scheduler(Rewritten(), 3)
    assert solver.coefficients[0].A == ((0.5,),) and solver.coefficients[0].B == (0.25,)
    with pytest.raises(TypeError, match="scheduler: Inherited is not supported: the network is called"):
        SolverTable.from_scheduler(Inherited(), 3)
