"""Mathematics: every solver's marginals on Gaussian data, exact in mean and variance, with no sampling.

A chain whose network is affine is affine in everything random: data, initial noise, the draws of each step. One tensor
carries the mean and the coefficient of each of these sources through the table, so that the variance after any step is
a sum of squares. Data N(MEAN, spread^2), ``x = alpha x0 + share eps``; the network that knows this predicts
``E[x0 | x] = MEAN + alpha spread^2 (x - alpha MEAN) / v`` with ``v = alpha^2 spread^2 + share^2``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import schedulertable as table
import torch
from torch import Tensor

from prfl_fast.solvers import SolverTable

diffusers = pytest.importorskip("diffusers")

MEAN = 0.7
UNSCALED = ("CM", "Cosine", "DPMSolverSDE", "EDM", "Euler", "Heun", "KDPM2", "LMS")
FLOW = ("FlowM", "LTX", "MiniMax", "Helios")


def scales(case: table.Case, sigma: float) -> tuple[float, float]:
    """(alpha, share) of a noise level in the scheduler's convention."""
    if case.settings.get("prediction_type") == "flow_prediction" or case.kind.startswith(FLOW):
        return (sigma, 1 - sigma) if case.settings.get("invert_sigmas") else (1 - sigma, sigma)
    if case.kind.startswith(UNSCALED):
        return 1.0, sigma
    alpha = 1 / math.hypot(1, sigma)
    return alpha, 1.0 if math.isinf(sigma) else sigma * alpha


def level(solver: SolverTable, i: int) -> float:
    """The noise level at which the network is called in step i: between two of the schedule's where a method has such
    evaluations, which the scaling of its input tells."""
    scale = solver.input_scales[i - solver.start_step]
    if solver.scheduler_name.startswith(("KDPM2", "DPMSolverSDE")):
        return math.sqrt(1 / scale**2 - 1)
    return float(solver.sigmas[i])


def marginals(case: table.Case, solver: SolverTable, spread: float) -> Iterator[tuple[float, float, float]]:
    """(sigma, mean, variance) after each step at which the latents are at a level of the schedule."""
    sources = 3 + sum(solver.step_coefficients(i).num_noise for i in range(solver.num_steps))
    alpha, share = scales(case, level(solver, 0))
    x = torch.zeros(sources, dtype=torch.float64)
    x[:3] = torch.tensor([alpha * MEAN, alpha * spread, share], dtype=torch.float64)
    state: tuple[Tensor, ...] = (x,)
    used = 3
    for i in range(solver.num_steps):
        alpha, share = scales(case, level(solver, i))
        a, b = solver.original_coefficients(i)
        clean = alpha * spread**2 * state[0] / (alpha**2 * spread**2 + share**2)
        clean[0] += MEAN * share**2 / (alpha**2 * spread**2 + share**2)
        noise = []
        for _ in range(solver.step_coefficients(i).num_noise):
            noise.append(torch.zeros(sources, dtype=torch.float64))
            noise[-1][used] = 1
            used += 1
        state = solver.step(i, state, (clean - a * state[0]) / b, tuple(noise))
        after = float(solver.sigmas[i + 1])
        # The scaling of the input tells the level to float32.
        if i + 1 == solver.num_steps or level(solver, i + 1) == pytest.approx(after, rel=1e-3):
            yield after, float(state[0][0]), float(state[0][1:].square().sum())


def deviation(case: table.Case, row: tuple[float, float, float], spread: float) -> tuple[float, float]:
    """Of mean and standard deviation from the exact ones, relative to the latents' size."""
    sigma, mean, variance = row
    alpha, share = scales(case, sigma)
    exact = math.hypot(alpha * spread, share)
    size = math.hypot(alpha * MEAN, exact)
    return abs(mean - alpha * MEAN) / size, abs(math.sqrt(variance) - exact) / size


# Why a scheduler's latents are not those of its noise levels even where the data is one point.
OTHERWISE = {
    "CMStochasticIterativeScheduler": "tells no denoised prediction",
    "ConsistencyDecoderScheduler": "tells no denoised prediction",
    "DDIMInverseScheduler": "its network is told the level that the step goes to",
    "IPNDMScheduler": "tells no noise levels",
    "SCMScheduler": "tells no noise levels; see test_trigflow_rows",
}


def _differs(case: table.Case) -> bool:
    settings, kind = case.settings, case.kind
    stride = settings.get("timestep_spacing") == "linspace" and "DDIM" in kind or kind == "CogVideoXDPMScheduler"
    return (
        kind in OTHERWISE
        # DDIM's steps go a whole stride, linspace's timesteps do not.
        or (stride and settings.get("timestep_spacing") == "linspace")
        # More noise than the posterior's, less noise by a factor, v of several levels added up.
        or settings.get("variance_type") == "fixed_large"
        or settings.get("s_noise", 1.0) != 1.0
        or (kind == "PNDMScheduler" and settings.get("prediction_type") == "v_prediction")
        # Methods in terms of noise, which does not stay the same once some was drawn: see the order tests.
        or settings.get("algorithm_type") in ("sde-dpmsolver", "noise_prediction")
    )


POINTS = [name for name, case in table.CASES.items() if case.linear and not _differs(case)]


def prepared(case: table.Case, steps: int) -> SolverTable:
    found = getattr(diffusers.schedulers, case.kind, None)
    if found is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {case.kind}")
    if not issubclass(found, diffusers.SchedulerMixin):
        pytest.importorskip("torchsde")
    return SolverTable.from_scheduler(*case.prepared(steps))


@pytest.mark.parametrize("name", POINTS)
def test_rows_keep_mean_and_variance_of_one_data_point(name: str) -> None:
    """Data without spread: the denoised prediction is constant along every path, and every method is exact.

    So each row takes ``alpha x0 + share eps`` of its level to that of the next, in whatever way the noise is shared
    between what was there and what is drawn. What is left is the schedule's float32, 2^-24, which matters relative to
    1 - alpha-bar, at least 1e-4 (squared cosine, which starts lower: 4e-5): twice that.
    """
    case = table.CASES[name]
    # Eight strides of these end above their last level.
    solver = prepared(case, 8 if case.kind in ("LCMScheduler", "TCDScheduler") else 5)
    # PNDM's Runge-Kutta steps keep the sum of derivatives, the latents that they began from and three old derivatives.
    assert max(row.num_inputs for row in solver.coefficients) <= (6 if case.kind == "PNDMScheduler" else 5)
    rows = list(marginals(case, solver, 0.0))
    assert len(rows) >= solver.num_steps // 2
    tolerance = 2 * 2**-24 / (4e-5 if case.kind == "UnCLIPScheduler" else 1e-4)
    for row in rows:
        assert max(deviation(case, row, 0.0)) <= tolerance, row


def test_trigflow_rows() -> None:
    # x = cos(t) x0 + sin(t) z with z of deviation sigma_data; x0 = cos(s) x - sin(s) m.
    scheduler = diffusers.SCMScheduler(sigma_data=0.5)
    scheduler.set_timesteps(4, intermediate_timesteps=None)
    solver = SolverTable.from_scheduler(scheduler, None)
    times = scheduler.timesteps.tolist()
    assert solver.num_steps == 4
    for i, (s, t) in enumerate(zip(times, times[1:], strict=False)):
        row = solver.step_coefficients(i)
        for actual, expected in (
            (row.A[0][0], math.cos(t) * math.cos(s)),
            (row.B[0], -math.cos(t) * math.sin(s)),
            (row.C[0][0], 0.5 * math.sin(t)),
        ):
            assert actual == pytest.approx(expected, abs=4 * 2**-24)  # float32 sines and cosines


EXPONENTIAL = {
    "use_exponential_sigmas": True,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
EDM = {"sigma_schedule": "exponential"}
NOISE = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
HEUN = {"solver_type": "heun"}
SDE = table.SDE


def _no_noise(timestep: float) -> float:
    return 0.0


def _full_noise(timestep: float) -> float:
    return 1.0


# class, settings, order: of the error in mean and deviation at the last level above 0.
# UniPC's corrector adds one to its predictor's order. DPM-Solver++ multistep starts with one step of order 1, error
# O(h^2), and so does order 3. Stochastic ones: the weak order.
ORDERS: list[tuple[str, table.Settings, float]] = [
    ("EulerDiscreteScheduler", EXPONENTIAL, 1),
    ("EDMEulerScheduler", EDM, 1),
    ("HeunDiscreteScheduler", EXPONENTIAL, 2),
    ("KDPM2DiscreteScheduler", EXPONENTIAL, 2),
    ("LMSDiscreteScheduler", EXPONENTIAL, 3.5),  # of order 4 from its fourth step on
    *(("DEISMultistepScheduler", {"solver_order": k, **EXPONENTIAL}, k) for k in (1, 2)),
    *(("DPMSolverMultistepScheduler", {"solver_order": k, **EXPONENTIAL}, min(k, 2)) for k in (1, 2, 3)),
    *(("DPMSolverMultistepScheduler", {"solver_order": k, **EXPONENTIAL, **NOISE}, k) for k in (1, 2)),
    ("DPMSolverMultistepScheduler", {**EXPONENTIAL, **HEUN}, 2),
    *(("DPMSolverSinglestepScheduler", {"solver_order": k, **EXPONENTIAL}, k) for k in (1, 2, 3)),
    *(("DPMSolverSinglestepScheduler", {"solver_order": k, **EXPONENTIAL, **NOISE}, k) for k in (1, 2, 3)),
    ("DPMSolverSinglestepScheduler", {**EXPONENTIAL, **HEUN}, 2),
    *(("EDMDPMSolverMultistepScheduler", {"solver_order": k, **EDM}, min(k, 2)) for k in (1, 2, 3)),
    *(("UniPCMultistepScheduler", {"solver_order": k, **EXPONENTIAL}, k + 1) for k in (1, 2)),
    *(("UniPCMultistepScheduler", {"solver_order": k, **EXPONENTIAL, **table.BH1}, k + 1) for k in (1, 2)),
    ("UniPCMultistepScheduler", {**EXPONENTIAL, "predict_x0": False, "final_sigmas_type": "sigma_min"}, 3),
    ("FlowMatchEulerDiscreteScheduler", {}, 1),
    ("FlowMatchHeunDiscreteScheduler", {}, 2),
    ("FlowMapEulerDiscreteScheduler", {}, 1),
    ("LTXEulerAncestralRFScheduler", {"eta": 0.0}, 1),
    ("HeliosScheduler", {"stages": 1, "scheduler_type": "euler"}, 1),
    ("HeliosScheduler", {"stages": 1}, 2),  # the last level, 0.66 / n, moves with n
    ("DDIMScheduler", table.UNCLIPPED, 1),
    ("CogVideoXDDIMScheduler", {}, 1),
    # Its corrector decides. The default draws noise between two timesteps only, which a grid meets or misses.
    *(
        ("SASolverScheduler", {**EXPONENTIAL, "predictor_order": 3 - k, "corrector_order": k, "tau_func": tau}, k)
        for k in (1, 2)
        for tau in (_no_noise, _full_noise)
    ),
    ("EulerAncestralDiscreteScheduler", {}, 1),
    ("KDPM2AncestralDiscreteScheduler", EXPONENTIAL, 2),
    ("LTXEulerAncestralRFScheduler", {}, 1),
    ("DDPMScheduler", table.UNCLIPPED, 1),
    ("CogVideoXDPMScheduler", {}, 1),
    *(("DPMSolverMultistepScheduler", {"solver_order": k, **EXPONENTIAL, **SDE}, k) for k in (1, 2)),
    ("DPMSolverMultistepScheduler", {**EXPONENTIAL, **SDE, **HEUN}, 2),
    *(("EDMDPMSolverMultistepScheduler", {"solver_order": k, **EDM, **SDE}, k) for k in (1, 2)),
    ("DPMSolverSDEScheduler", {**EXPONENTIAL, "noise_sampler_seed": 1}, 1),
    *(("CosineDPMSolverMultistepScheduler", {"solver_order": k}, k) for k in (1, 2)),
]


@pytest.mark.parametrize(("kind", "settings", "order"), ORDERS)
def test_mean_and_variance_converge_in_order(kind: str, settings: table.Settings, order: float) -> None:
    """Slope of log error over log step size between two numbers of steps; O(h) of it is the next order's."""
    spread, few, many = 0.5, 25, 100
    errors = {}
    for steps in (few, many):
        case = table.Case(kind, kind, settings)
        rows = list(marginals(case, prepared(case, steps), spread))
        row = rows[-2] if rows[-1][0] == 0 else rows[-1]
        errors[steps] = math.hypot(*deviation(case, row, spread))
    slope = math.log(errors[few] / errors[many]) / math.log(many / few)
    assert slope == pytest.approx(order, abs=0.35), errors
