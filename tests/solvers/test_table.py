"""The table against the scheduler's own loop, in float64 and float32, and against formulas."""

from __future__ import annotations

import dataclasses
import math

import pytest
import schedulerloop as loop
import torch

from prfl_fast.solvers import NonFiniteSchedulerError, NonlinearSchedulerError, SolverTable
from prfl_fast.solvers.probe import Probes, StepProbe, read_original

pytest.importorskip("diffusers")

STEPS = 9


def latents(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype) * float(loop.build(name).init_noise_sigma if "euler-" in name[:6] else 1)


@pytest.mark.parametrize("name", loop.CASES)
def test_float64_chain_equals_the_own_loop(name: str) -> None:
    # Both make some 20 float64 roundings a step in another order; the network's slope is at most 1 and the solvers are
    # stable, so 9 steps stay near 200 * 2^-53 = 2e-14. Schedulers that round latents are run without that rounding.
    scheduler = loop.build(name)
    table = SolverTable.from_scheduler(scheduler, STEPS)
    x = latents(name, 2, 3, 2, 5, 4).transpose(-1, -2)
    with loop.without_rounding():
        expected = loop.own_loop(scheduler, STEPS, x)
    assert expected.dtype == torch.float64 and expected.isfinite().all()
    actual = loop.solver_loop(table, x)
    assert actual.dtype == torch.float64
    assert loop.distance(actual, expected) <= 1e-12


@pytest.mark.parametrize("name", sorted(loop.CASES.keys() - loop.ROUNDING))
def test_these_need_no_help_to_compute_in_float64(name: str) -> None:
    scheduler = loop.build(name)
    x = latents(name, 2, 3, 2, 4, 4)
    expected = loop.own_loop(scheduler, STEPS, x)
    assert loop.distance(loop.solver_loop(SolverTable.from_scheduler(scheduler, STEPS), x), expected) <= 1e-12


@pytest.mark.parametrize("name", sorted(loop.ROUNDING))
def test_those_that_round_are_met_to_their_rounding(name: str) -> None:
    # Each step rounds x once or twice by 2^-24; 17 steps at most (Heun), unit amplification each, and 1 / sigma in
    # Heun's derivatives: below 2^-24 * 17 * 8 = 8e-6. That it is not equal shows that the case belongs here.
    scheduler = loop.build(name)
    x = latents(name, 2, 3, 2, 4, 4)
    own = loop.own_loop(scheduler, STEPS, x)
    assert 1e-12 < loop.distance(loop.solver_loop(SolverTable.from_scheduler(scheduler, STEPS), x), own) <= 8e-6


@pytest.mark.parametrize("steps", [8, 40])
@pytest.mark.parametrize("name", ["unipc2-bh2", "unipc3-bh1", "dpm3-flow", "dpm2-epsilon", "ddim-v", "euler-v",
                                  "flow-euler", "flow-heun"])  # fmt: skip
def test_float32_is_no_further_from_the_truth_than_the_own_float32(name: str, steps: int) -> None:
    # Given network outputs, so that the solver's rounding alone is compared. Errors of 4096 elements: their norms
    # scatter by 1 / sqrt(2 * 4096) = 1.1 %; five of these are the margin where both round alike (flow-euler).
    scheduler = loop.build(name)
    table = SolverTable.from_scheduler(scheduler, steps)
    x = latents(name, 4, 4, 16, 16, dtype=torch.float32)
    outputs = [torch.randn(x.shape) for _ in range(table.num_steps)]

    def given(dtype: torch.dtype) -> loop.Network:
        queue = iter(outputs)
        return lambda _, __: next(queue).to(dtype)

    with loop.without_rounding():
        truth = loop.own_loop(scheduler, steps, x.double(), given(torch.float64))
    own = loop.own_loop(scheduler, steps, x, given(torch.float32))
    ours = loop.solver_loop(table, x, given(torch.float32))
    assert ours.dtype == torch.float32
    assert loop.distance(ours, truth) <= 1.055 * loop.distance(own, truth)


def test_flow_euler_is_its_formula() -> None:
    # x' = x + (sigma' - sigma) v, both sigmas float32, their difference rounded to float32 by the scheduler.
    table = SolverTable.from_scheduler(loop.build("flow-euler"), 7)
    differences = (table.sigmas[1:].float() - table.sigmas[:-1].float()).tolist()
    for i in range(7):
        row = table.step_coefficients(i)
        assert row.A == ((1.0,),) and row.B == (differences[i],) and row.C == ((),)
        assert table.original_coefficients(i) == (1.0, -float(table.sigmas[i]))
        assert table.scale_input(i, torch.ones(2)).equal(torch.ones(2))


def test_euler_v_prediction_is_its_formula() -> None:
    """A scheduler whose arithmetic on the rounded latents is float32 still gives float64 coefficients."""
    table = SolverTable.from_scheduler(loop.build("euler-v"), 6)
    for i in range(6):
        s, after = float(table.sigmas[i]), float(table.sigmas[i + 1])
        a, b = 1 / (s * s + 1), -s / math.sqrt(s * s + 1)
        row = table.step_coefficients(i)
        # The scheduler computes sigma^2 + 1 and the like in float32 numbers: 4 roundings of 2^-24, amplified by
        # (1 - a) ~ s^2 / (s^2 + 1) at small sigma, whence the division.
        bound = 4 * 2**-24 * max(1.0, 1 / s)
        assert row.A[0][0] == pytest.approx(1 + (1 - a) / s * (after - s), abs=bound)
        assert row.B[0] == pytest.approx(-b / s * (after - s), rel=bound)
        assert table.original_coefficients(i) == pytest.approx((a, b), rel=4 * 2**-24)
        assert table.input_scales[i] == pytest.approx(1 / math.sqrt(s * s + 1), rel=4 * 2**-24)


def test_ddim_is_its_formula() -> None:
    scheduler = loop.build("ddim-epsilon")
    table = SolverTable.from_scheduler(scheduler, 5)
    bars = 1 / (1 + table.sigmas**2)  # alpha-bar before each step and after the last
    for i in range(5):
        now, after = float(bars[i]), float(bars[i + 1])
        a = math.sqrt(after / now)
        b = math.sqrt(1 - after) - a * math.sqrt(1 - now)
        row = table.step_coefficients(i)
        # alpha-bar is float32 and so are its roots: 2^-24 each, relative to terms below a and 1; 1 - after cancels near
        # 0, whose root may be off by sqrt(2^-24) only where after is 1 itself.
        assert row.A[0][0] == pytest.approx(a, rel=8 * 2**-24)
        assert row.B[0] == pytest.approx(b, abs=16 * 2**-24 * a)
    assert float(table.sigmas[-1]) == 0


def test_unipc_last_step_to_sigma_zero_gives_the_denoised_prediction() -> None:
    # lambda is infinite there; the step is x0 = x - sigma v exactly.
    table = SolverTable.from_scheduler(loop.build("unipc3-bh2"), 6)
    row = table.step_coefficients(5)
    assert row.num_outputs == 1 and row.A[0][0] == 1 and not any(row.A[0][1:])
    assert row.B[0] == -float(table.sigmas[5])


@pytest.mark.parametrize("name", [n for n in loop.CASES if n != "flow-euler-inverted"])
def test_the_denoised_prediction_is_that_of_the_clean_latent(name: str) -> None:
    # A network that knows x0 and noise; a x + b m must give x0.
    scheduler = loop.build(name)
    table = SolverTable.from_scheduler(scheduler, STEPS)
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64).unbind(0)
    kind = scheduler.config.get("prediction_type", "flow_prediction")
    for i in range(table.num_steps):
        sigma = float(table.sigmas[i])
        alpha = 1 / math.hypot(1, sigma)
        share = 1.0 if math.isinf(sigma) else sigma * alpha
        if kind == "flow_prediction":
            x, m, scale = (1 - sigma) * clean + sigma * noise, noise - clean, 1.0
        else:
            unscaled = name.startswith(("euler", "heun", "lms"))
            scale = 1 / alpha if unscaled else 1.0
            x = (alpha * clean + share * noise) * scale
            m = noise if kind == "epsilon" else alpha * noise - share * clean
        a, b = table.original_coefficients(i)
        # The terms a x and b m are as large as |x0| / alpha where the network predicts noise, and cancel.
        size = (abs(a) * x.abs() + abs(b) * m.abs()).max()
        assert (a * x + b * m - clean).abs().max() <= 2**-24 * 16 * float(size) + 1e-6


def test_a_told_prediction_counts_only_as_a_map_of_latents_and_output() -> None:
    probes = Probes(0)
    x, h, m = probes[0], probes[1], probes[2]

    def told(original: torch.Tensor | None) -> tuple[float, float] | None:
        return read_original(StepProbe(2, 0, x, (x, h), original), probes)

    assert told(2 * x + 5 * m) == (2.0, 5.0)
    for other in (None, 2 * x + 3 * h + 5 * m, 2 * x + 1, x.clamp(-1, 1), x[0]):
        assert told(other) is None


def test_only_what_later_steps_read_is_carried() -> None:
    widths = {
        n: max(c.num_inputs for c in SolverTable.from_scheduler(loop.build(n), 8).coefficients) for n in loop.CASES
    }
    # Latents; UniPC of order p adds the last sample and p denoised predictions; DPM-Solver p - 1 of them; Heun the
    # derivative and the latents of its first evaluation.
    assert [widths[f"unipc{p}-bh2"] for p in (1, 2, 3)] == [3, 4, 5]
    assert [widths[f"dpm{p}-flow"] for p in (1, 2, 3)] == [1, 2, 3]
    assert widths["flow-euler"] == widths["euler-epsilon"] == widths["ddim-v"] == 1
    assert widths["flow-heun"] == 3
    for name in loop.CASES:
        assert SolverTable.from_scheduler(loop.build(name), 8).coefficients[-1].num_outputs == 1


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["unipc3-bh2", "dpm3-flow", "ddim-epsilon", "flow-heun", "flow-euler", "euler-v"])
def test_very_short_schedules(name: str, steps: int) -> None:
    scheduler = loop.build(name)
    x = latents(name, 1, 1, 1, dtype=torch.float64)[None]
    with loop.without_rounding():
        expected = loop.own_loop(scheduler, steps, x)
    assert loop.distance(loop.solver_loop(SolverTable.from_scheduler(scheduler, steps), x), expected) <= 1e-12


@pytest.mark.parametrize("shape", [(3,), (2, 7), (2, 3, 4), (1, 2, 3, 1, 2), (0, 3)])
def test_any_shape_of_latents(shape: tuple[int, ...]) -> None:
    table = SolverTable.from_scheduler(loop.build("unipc2-bh2"), 4)
    assert loop.solver_loop(table, torch.randn(shape)).shape == shape


def test_half_precision_latents_are_raised_to_float32() -> None:
    table = SolverTable.from_scheduler(loop.build("unipc2-bh2"), 4)
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    state = table.initial_state(x)
    assert state[0].dtype == torch.float32 and state[0].equal(x.float())
    assert table.step(0, state, torch.randn(2, 3).bfloat16())[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["unipc3-bh2", "dpm3-flow", "flow-heun", "euler-v"])
def test_samples_do_not_know_of_each_other(name: str) -> None:
    table = SolverTable.from_scheduler(loop.build(name), 5)
    x = torch.randn(4, 2, 3, 3)
    order = torch.tensor([2, 0, 3, 1])
    together = loop.solver_loop(table, x)
    assert loop.solver_loop(table, x[order]).equal(together[order])
    assert torch.cat([loop.solver_loop(table, one[None]) for one in x]).equal(together)


@pytest.mark.parametrize("name", ["unipc3-bh2", "dpm3-flow", "flow-heun", "ddim-v", "euler-v"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_adjoint_identity(name: str, masked: bool) -> None:
    # <step(z, m), w> = <z, A^T w> + <m, B^T w>: 64 terms of float64, 1e-13 relative.
    table = SolverTable.from_scheduler(loop.build(name), 6)
    mask = torch.rand(2, 1, 4) < 0.5 if masked else None
    for i in range(table.num_steps):
        row = table.step_coefficients(i)
        z = tuple(torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(row.num_inputs))
        m = torch.randn(2, 3, 4, dtype=torch.float64)
        out = table.step(i, z, m, latent_mask=mask)
        w = [torch.randn_like(m) for _ in out]
        into_z, (into_m,) = table.pullback(i, None, None, (), w, mask)
        left = sum(float((a * b).sum()) for a, b in zip(out, w, strict=True))
        right = sum(float((a * b).sum()) for a, b in zip((*z, m), (*into_z, into_m), strict=True) if b is not None)
        assert left == pytest.approx(right, rel=1e-12, abs=1e-12)


def test_the_mask_holds_the_latents_and_nothing_else() -> None:
    table = SolverTable.from_scheduler(loop.build("unipc2-bh2"), 4)
    mask = torch.zeros(1, 1, 4, dtype=torch.bool)
    mask[..., 1:3] = True
    x, m = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    free, held = table.step(0, (x,), m), table.step(0, (x,), m, latent_mask=mask)
    assert held[0][..., 1:3].equal(free[0][..., 1:3])
    assert held[0][..., [0, 3]].equal(x[..., [0, 3]])
    assert all(a.equal(b) for a, b in zip(free[1:], held[1:], strict=True))


def test_frozen_and_printable() -> None:
    table = SolverTable.from_scheduler(loop.build("unipc2-bh2"), 5, start_step=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.num_steps = 3  # type: ignore[misc]
    assert repr(table) == "SolverTable(UniPCMultistepScheduler, 5 steps, from step 2, sigma 0.8184 -> 0, state of 3)"
    lines = str(table).splitlines()
    assert len(lines) == 2 + 3 and "x " in lines[2] and " m" in lines[2]
    assert table.linear and len(table.coefficients) == 3
    assert table.sigmas.shape == (6,) and table.sigmas.dtype == torch.float64


def test_steps_outside_are_refused() -> None:
    table = SolverTable.from_scheduler(loop.build("unipc2-bh2"), 5, start_step=2)
    x = torch.randn(1, 2)
    for i in (-1, 1, 5):
        for call in (table.original_coefficients, table.step_coefficients):
            with pytest.raises(IndexError, match=rf"i: expected a step in 2..4, got {i}"):
                call(i)
        with pytest.raises(IndexError, match="expected a step in 2..4"):
            table.scale_input(i, x)
    with pytest.raises(ValueError, match="state: expected 1 tensors, got 2"):
        table.step(2, (x, x), x)


NONLINEAR = {
    "clip_sample": ("DDIMScheduler", {"clip_sample": True}),
    "thresholding": ("UniPCMultistepScheduler", {"thresholding": True}),
    "clip range": ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 1000.0}),
    "consistency": ("CMStochasticIterativeScheduler", {}),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_steps_are_refused_by_name(name: str) -> None:
    import diffusers

    kind, settings = NONLINEAR[name]
    with pytest.raises(NonlinearSchedulerError, match=f"step 0 of {kind} is not linear") as refused:
        SolverTable.from_scheduler(getattr(diffusers, kind)(**settings), 4)
    assert "solver='scheduler'" in str(refused.value)
    assert not isinstance(refused.value, NonFiniteSchedulerError)
    if name in ("clip_sample", "thresholding"):
        assert f"{name}=True" in str(refused.value)


def _euler_with(after: object) -> object:
    """FlowMatchEuler whose step is followed by ``after(latents, model output)``."""
    import diffusers

    class Changed(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):  # type: ignore[no-untyped-def]
            return (after(super().step(model_output, timestep, sample, return_dict=False)[0], model_output),)

    return Changed(shift=3.0)


@pytest.mark.parametrize(
    "after",
    [
        lambda x, m: x + 1e-6,
        lambda x, m: x.clamp(-1e5, 1e5),
        lambda x, m: x - 1e-6 * x.mean(),
        lambda x, m: x * (1 + 1e-6 * m.std(dim=(1, 2, 3, 4), keepdim=True)),
        lambda x, m: x + 1e-5 * x.flip(-1),
        lambda x, m: x * torch.linspace(1, 1.00001, x.shape[1]).reshape(1, -1, 1, 1, 1),
        lambda x, m: x + 1e-4 * x * m.abs(),
        lambda x, m: torch.where(x.abs() < 1e-4, 0.0, x),
    ],
    ids=["constant", "wide clip", "mean", "norm", "neighbours", "channels", "product", "dead zone"],
)
def test_small_departures_are_seen(after: object) -> None:
    with pytest.raises(NonlinearSchedulerError, match="is not linear"):
        SolverTable.from_scheduler(_euler_with(after), 4)


def test_run_state_that_depends_on_values_is_refused() -> None:
    import diffusers

    class Adaptive(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, return_dict=True):  # type: ignore[no-untyped-def]
            self.largest = float(sample.abs().max())
            return super().step(model_output, timestep, sample, return_dict=return_dict)

    with pytest.raises(NonlinearSchedulerError, match="keeps 'largest', which depends on the latents' values"):
        SolverTable.from_scheduler(Adaptive(), 4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_configurations_that_give_nan_are_refused(order: int) -> None:
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(solver_order=order, solver_type="bh1", **loop.FLOW)
    with pytest.raises(NonFiniteSchedulerError, match=r"NaN or infinity in step 4 of 5 .*sigma .* -> 0\).*solver_type"):
        SolverTable.from_scheduler(scheduler, 5)
