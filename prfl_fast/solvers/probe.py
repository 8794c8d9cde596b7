"""One recorded step, read as a matrix: probes go in, and what comes out is the coefficients and the proof of linearity.

Sample 0 of the probe batch carries unit vectors: element k is 1 in input k and 0 in all others, so element k of every
output is that output's coefficient of input k, to the last bits of float64 (no difference of large numbers is taken),
and the elements that no input owns show any constant part. The other samples carry random values of magnitudes 2^-20 to
2^20: they must come out as the coefficients say, in every element. So one step of the scheduler tells its matrix and
whether it is one: clipping, thresholding, a norm of the latents or coefficients that depend on the place all fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prfl_fast.ops import StepCoefficients
from prfl_fast.solvers.base import NonFiniteSchedulerError, NonlinearSchedulerError
from prfl_fast.solvers.replay import PROBE_SHAPE, Replay

# Allowed deviation from the matrix, relative to the sum of (1 + |coefficient|) |value|: an input with coefficient 0 may
# have come and gone, as x does in (x - (x - sigma m)) / sigma. A step makes some 2^6 roundings of 2^-53, on values that
# exceed those terms by the scheduler's own cancellation (1 / alpha at high noise, 1 / sigma at low, 1 / h between close
# ones); 2^11 is left for that. A clipped value deviates by order 1.
EXACT = 2.0**-36
# The same where the scheduler rounds latents to float32, unit 2^-24, in one or two places.
ROUNDED = 2.0**-24 * 2.0**11

_PER_SAMPLE = PROBE_SHAPE[1:].numel()


class Probes:
    """The probe tensors, input by input; two seeds differ in every random value."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn((_PER_SAMPLE, *PROBE_SHAPE), generator=generator, dtype=torch.float64)
        # Of one magnitude in samples 1 to 3, so that none hides another; all together in sample 4; 5 is as it is.
        for sample, exponent in ((1, -20), (2, -10), (3, 20)):
            values[:, sample] *= 2.0**exponent
        values[:, 4] *= 2.0 ** torch.randint(-20, 21, values[:, 4].shape, generator=generator)
        values[:, 0] = torch.eye(_PER_SAMPLE, dtype=torch.float64).reshape(_PER_SAMPLE, *PROBE_SHAPE[1:])
        self._values = values

    def __getitem__(self, k: int) -> Tensor:
        return self._values[k].clone()

    def first(self, count: int) -> Tensor:
        """``[count, elements of the batch]``."""
        return self._values[:count].reshape(count, -1)


@dataclass(frozen=True)
class StepProbe:
    """What came out of one step.

    Attributes:
        num_state: entries of the state before it.
        num_noise: its draws.
        scaled: the network's input for x.
        outputs: latents and history after the step.
        original: the denoised prediction, where the scheduler tells it.
    """

    num_state: int
    num_noise: int
    scaled: Tensor
    outputs: tuple[Tensor, ...]
    original: Tensor | None


def record_step(replay: Replay, i: int, probes: Probes) -> StepProbe:
    """Records step i with probes for x, history, network output and noise, in this order."""
    num_state = 1 + replay.num_slots(i)
    used = num_state + 1

    def supply(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        nonlocal used
        if shape != PROBE_SHAPE:
            raise NonlinearSchedulerError(
                f"scheduler: {_name(replay)} draws noise of shape {tuple(shape)} in step {i}; expected the latents' "
                f"shape {tuple(PROBE_SHAPE)}"
            )
        used += 1
        return probes[_within(replay, used - 1)]

    _within(replay, used)
    slots = [probes[k] for k in range(1, num_state)]
    scaled, result = replay.record(i, probes[0], slots, probes[num_state], supply)
    probe = StepProbe(num_state, used - num_state - 1, scaled, (result.x, *result.slots), result.original)
    for tensor in (scaled, *probe.outputs):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteSchedulerError(
                f"scheduler: {_name(replay)} gives NaN or infinity in step {i} of {replay.num_steps} "
                f"(timestep {float(replay.timesteps[i]):g}{_levels(replay, i)}) for finite latents and network output; "
                "choose other settings (final_sigmas_type, solver_type, lower_order_final, number of steps)"
            )
    return probe


def read_step(replay: Replay, i: int, probe: StepProbe, probes: Probes) -> StepCoefficients:
    """The coefficients of step i, from its probe.

    Raises:
        NonlinearSchedulerError: something came out otherwise than the coefficients say.
    """
    n = probe.num_state
    matrix = coefficients_of(probe.outputs, n + 1 + probe.num_noise)
    check_step(replay, i, matrix, probe, probes, EXACT)
    rows = matrix.tolist()
    return StepCoefficients(
        A=tuple(tuple(row[:n]) for row in rows),
        B=tuple(row[n] for row in rows),
        C=tuple(tuple(row[n + 1 :]) for row in rows),
    )


def check_step(replay: Replay, i: int, matrix: Tensor, probe: StepProbe, probes: Probes, tolerance: float) -> None:
    """Refuses step i where it did something else to the probes than ``matrix``."""
    if len(matrix) == len(probe.outputs) and follows(matrix, probe.outputs, probes, tolerance):
        return
    raise NonlinearSchedulerError(
        f"scheduler: step {i} of {_name(replay)} is not linear in latents, history, network output and noise"
        f"{_suspects(replay)}; use solver='scheduler', which keeps its own step in the graph"
    )


def read_scale(replay: Replay, i: int, probe: StepProbe, probes: Probes) -> float:
    """s of ``scale_model_input(x) = s x``."""
    matrix = coefficients_of((probe.scaled,), 1)
    if not follows(matrix, (probe.scaled,), probes, EXACT):
        raise NonlinearSchedulerError(
            f"scheduler: {_name(replay)}.scale_model_input is not a multiple of the latents in step {i}; use "
            "solver='scheduler'"
        )
    return float(matrix)


def read_original(probe: StepProbe, probes: Probes) -> tuple[float, float] | None:
    """(a, b) of the scheduler's denoised prediction ``a x + b m``; None where it tells none, or one of another form."""
    if probe.original is None or probe.original.shape != PROBE_SHAPE:
        return None
    n = probe.num_state
    matrix = coefficients_of((probe.original,), n + 1)
    matrix[:, 1:n] = 0
    if not follows(matrix, (probe.original,), probes, EXACT):
        return None
    return float(matrix[0, 0]), float(matrix[0, n])


def step_matrix(coefficients: StepCoefficients) -> Tensor:
    """``[outputs, inputs]``, inputs in the probes' order."""
    rows = zip(coefficients.A, coefficients.B, coefficients.C, strict=True)
    return torch.tensor([(*a, b, *c) for a, b, c in rows], dtype=torch.float64)


def coefficients_of(outputs: Sequence[Tensor], count: int) -> Tensor:
    """``[outputs, count]`` float64, from sample 0."""
    return torch.stack([output[0].reshape(-1)[:count].double() for output in outputs])


def follows(matrix: Tensor, outputs: Sequence[Tensor], probes: Probes, tolerance: float) -> bool:
    """True where the outputs are the matrix times the probes, every element of every sample; false for NaN."""
    inputs = probes.first(matrix.shape[1])
    actual = torch.stack([output.reshape(-1).double() for output in outputs])
    error = (actual - matrix @ inputs).abs()
    return bool((error <= tolerance * ((1 + matrix.abs()) @ inputs.abs())).all())


def _name(replay: Replay) -> str:
    return type(replay.scheduler).__name__


def _within(replay: Replay, index: int) -> int:
    if index >= _PER_SAMPLE:
        raise NonlinearSchedulerError(
            f"scheduler: {_name(replay)} keeps or draws more than {_PER_SAMPLE - 2} tensors in one step"
        )
    return index


def _levels(replay: Replay, i: int) -> str:
    sigmas = getattr(replay.scheduler, "sigmas", None)
    place = replay.offset + i
    if sigmas is None or len(sigmas) < place + 2:
        return ""
    return f", sigma {float(sigmas[place]):g} -> {float(sigmas[place + 1]):g}"


def _suspects(replay: Replay) -> str:
    """The settings that commonly make a step nonlinear, where they are on."""
    on = [name for name in ("thresholding", "clip_sample") if getattr(replay.scheduler.config, name, False)]
    return f" ({', '.join(f'{name}=True' for name in on)})" if on else ""
