"""Mathematics: on Gaussian data the probability flow has a closed solution, which the solvers must approach in order.

Data N(mean, spread^2), ``x = alpha x0 + sigma eps``: the network that knows this predicts
``E[x0 | x] = mean + alpha spread^2 (x - alpha mean) / v`` with ``v = alpha^2 spread^2 + sigma^2``, and along the flow
``(x - alpha mean) / sqrt(v)`` is constant.
"""

from __future__ import annotations

import math

import pytest
import schedulerloop as loop
import torch
from torch import Tensor

from prfl_fast.solvers import Solver, make_solver

diffusers = pytest.importorskip("diffusers")

MEAN, SPREAD = 0.7, 0.5
FLOW = {**loop.FLOW, "flow_shift": 1.0}


def scales(sigma: float, convention: str) -> tuple[float, float]:
    if convention == "flow":
        return 1 - sigma, sigma
    if convention == "unscaled":
        return 1.0, sigma
    return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def prediction(x: Tensor, sigma: float, convention: str, kind: str, spread: float) -> Tensor:
    alpha, share = scales(sigma, convention)
    clean = MEAN + alpha * spread**2 * (x - alpha * MEAN) / (alpha**2 * spread**2 + share**2)
    noise = (x - alpha * clean) / share
    if kind == "v":  # of the variance-preserving latents, whatever the scheduler's own scale
        alpha, share = scales(sigma, "variance preserving")
        return alpha * noise - share * clean
    return noise - clean if kind == "flow" else noise


def error(solver: Solver, convention: str, kind: str, stop: int, spread: float = SPREAD) -> float:
    """Largest error after ``stop`` steps, from samples that lie on the flow at the first noise level."""

    def deviation(i: int) -> float:
        alpha, share = scales(float(solver.sigmas[i]), convention)
        return math.sqrt(alpha**2 * spread**2 + share**2)

    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    state: tuple[Tensor, ...] = (scales(float(solver.sigmas[0]), convention)[0] * MEAN + deviation(0) * z,)
    for i in range(stop):
        state = solver.step(i, state, prediction(state[0], float(solver.sigmas[i]), convention, kind, spread))
    exact = scales(float(solver.sigmas[stop]), convention)[0] * MEAN + deviation(stop) * z
    return float((state[0] - exact).abs().max())


def multistep(kind: type, n: int, **settings: object) -> Solver:
    """n steps from sigma 0.9 to 0.1, even in lambda; the step to 0 that the scheduler adds is not run."""
    levels = 1 / (1 + torch.exp(torch.linspace(-math.log(9), math.log(9), n + 1, dtype=torch.float64)))
    scheduler = kind(**FLOW, **settings)
    if kind is diffusers.DPMSolverMultistepScheduler:
        scheduler.set_timesteps(n + 1)
        scheduler.sigmas = torch.cat([levels, torch.zeros(1)]).float()
    else:
        scheduler.set_timesteps(sigmas=levels.numpy())
    return make_solver(scheduler, None)


def slope(errors: dict[int, float]) -> float:
    """Of log error over log step size, least squares."""
    h = torch.tensor([math.log(1 / n) for n in errors])
    e = torch.tensor([math.log(v) for v in errors.values()])
    return float(((h - h.mean()) * (e - e.mean())).sum() / (h - h.mean()).square().sum())


# Global order. UniPC's corrector adds one to the predictor's; its first step, predictor of order 1 and corrector, errs
# by O(h^3), which holds order 3 back to 3. DPM-Solver++ starts with one step of order 1, error O(h^2): 2 for order 3.
ORDERS = [
    ("UniPCMultistepScheduler", {"solver_order": 1, "solver_type": "bh2"}, 2),
    ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, 3),
    ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh2"}, 3),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, 1),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, 2),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}, 2),
]


@pytest.mark.parametrize(("name", "settings", "order"), ORDERS)
def test_order_of_the_multistep_solvers(name: str, settings: dict[str, object], order: int) -> None:
    kind = getattr(diffusers, name)
    errors = {n: error(multistep(kind, n, **settings), "flow", "flow", n) for n in (20, 40, 80)}
    # Next-order terms, at h = 4.4 / n in lambda, bend the line by O(h) of the slope. Float32 sigmas leave 1e-7.
    assert slope(errors) == pytest.approx(order, abs=0.3), errors
    assert min(errors.values()) > 1e-6


ONE_STEP = [
    ("flow-euler", "flow", "flow", 1, {"shift": 1.0}),
    ("flow-heun", "flow", "flow", 2, {"shift": 1.0}),
    ("euler-epsilon", "unscaled", "epsilon", 1, {"use_karras_sigmas": True, "sigma_max": 10.0, "sigma_min": 0.5}),
    ("heun", "unscaled", "epsilon", 2, {"use_karras_sigmas": True}),
    ("ddim-v", "variance preserving", "v", 1, {}),
]


@pytest.mark.parametrize(("name", "convention", "kind", "order", "settings"), ONE_STEP)
def test_order_of_the_one_step_solvers(
    name: str, convention: str, kind: str, order: int, settings: dict[str, object]
) -> None:
    class_name, given = loop.CASES[name]
    errors = {}
    for n in (25, 50, 100, 200):
        solver = make_solver(getattr(diffusers, class_name)(**{**given, **settings}), n)
        errors[n] = error(solver, convention, kind, solver.num_steps - 1)
    assert slope(errors) == pytest.approx(order, abs=0.3), errors


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    ("name", "convention", "kind"),
    [
        ("unipc1-bh2", "flow", "flow"),
        ("unipc2-bh2", "flow", "flow"),
        ("unipc3-bh2", "flow", "flow"),
        ("dpm2-flow", "flow", "flow"),
        ("dpm3-flow", "flow", "flow"),
        ("dpm2-epsilon", "variance preserving", "epsilon"),
        ("ddim-epsilon", "variance preserving", "epsilon"),
        ("ddim-v", "variance preserving", "v"),
        ("euler-epsilon", "unscaled", "epsilon"),
        ("euler-v", "unscaled", "v"),
        ("flow-euler", "flow", "flow"),
        ("flow-heun", "flow", "flow"),
    ],
)
def test_one_data_point_is_reached_exactly_in_any_number_of_steps(
    name: str, convention: str, kind: str, n: int
) -> None:
    # Along the flow to a single point the prediction of x0 is constant and the velocity is too, so every one of these
    # solvers is exact: what is left is the schedule's float32, 2^-24 relative to sigma <= 157 and amplified by
    # 1 / sigma where noise is computed from latents.
    solver = make_solver(loop.build(name), n)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha, share = scales(float(solver.sigmas[0]), convention)
    state: tuple[Tensor, ...] = (alpha * MEAN + share * z,)
    for i in range(solver.num_steps):
        state = solver.step(i, state, prediction(state[0], float(solver.sigmas[i]), convention, kind, 0.0))
    alpha, share = scales(float(solver.sigmas[-1]), convention)
    # A first level of sigma 1 - 1e-6 (UniPC) divides by 1 - sigma, which float32 knows to 6 % only.
    assert torch.allclose(state[0], alpha * MEAN + share * z, rtol=0, atol=2e-4)
