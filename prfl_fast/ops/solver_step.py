"""One solver step for fixed timesteps is a linear map: ``z' = A z + B m + C eps``.

``z`` is the solver's state (entry 0 is the latents x), ``m`` the network's output, ``eps`` the step's noise draws; A, B
and C are a handful of float64 numbers. So the op's adjoint needs the coefficients alone: no activation is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepCoefficients:
    """Coefficients of one step, float64.

    Attributes:
        A: ``[n_out][n_in]``, from the state before the step to the state after it.
        B: ``[n_out]``, from the network's output.
        C: ``[n_out][n_noise]``, from the noise draws.
    """

    A: tuple[tuple[float, ...], ...]
    B: tuple[float, ...]
    C: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.A or not len(self.A) == len(self.B) == len(self.C):
            raise ValueError(
                "coefficients: expected A, B and C with one row per output entry, "
                f"got {len(self.A)}, {len(self.B)} and {len(self.C)} rows"
            )
        if len({len(row) for row in self.A}) != 1 or len({len(row) for row in self.C}) != 1:
            raise ValueError("coefficients: expected rows of one length in A and in C")

    @property
    def num_outputs(self) -> int:
        """Entries of the state after the step."""
        return len(self.A)

    @property
    def num_inputs(self) -> int:
        """Entries of the state before the step."""
        return len(self.A[0])

    @property
    def num_noise(self) -> int:
        """Noise draws of the step."""
        return len(self.C[0])


class _Wide:
    """Float32 tensors as float64, each converted once. MPS has no float64; there they stay as they are."""

    def __init__(self) -> None:
        self._converted: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64 or tensor.device.type == "mps":
            return tensor
        return self._converted.setdefault(id(tensor), tensor.double())


def _combine(terms: Iterable[tuple[float, Tensor | None]], wide: _Wide) -> Tensor | None:
    """Sum of coefficient times tensor, rounded once; None where nothing is left. A lone 1 times tensor is no copy."""
    present = [(coefficient, tensor) for coefficient, tensor in terms if coefficient != 0 and tensor is not None]
    if not present:
        return None
    (first, tensor), *others = present
    if first == 1 and not others:
        return tensor
    total = wide(tensor) * first
    for coefficient, other in others:
        total = torch.add(total, wide(other), alpha=coefficient)
    return total.to(tensor.dtype)


def as_mask(mask: Tensor) -> Tensor:
    """A bool or 0/1 mask as bool."""
    return mask if mask.dtype == torch.bool else mask != 0


def _check(state: Sequence[Tensor], outputs: Sequence[Tensor], noise: Sequence[Tensor], c: StepCoefficients) -> None:
    if len(state) != c.num_inputs:
        raise ValueError(f"state: expected {c.num_inputs} tensors, got {len(state)}")
    if len(noise) != c.num_noise:
        raise ValueError(f"noise: expected {c.num_noise} tensors, got {len(noise)}")
    if len(outputs) not in (1, 2):
        raise ValueError(f"model_outputs: expected (m,) or (conditional, unconditional), got {len(outputs)} tensors")
    x = state[0]
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state: expected float32 or float64, got {x.dtype}")
    for entry in state:
        if entry.dtype != x.dtype or entry.shape != x.shape:
            raise ValueError(
                f"state: expected one dtype and shape ({x.dtype}, {tuple(x.shape)}), "
                f"got {entry.dtype}, {tuple(entry.shape)}"
            )
    for name, tensors in (("model_outputs", outputs), ("noise", noise)):
        for tensor in tensors:
            if tensor.shape != x.shape:
                raise ValueError(f"{name}: expected the state's shape {tuple(x.shape)}, got {tuple(tensor.shape)}")


def solver_step(
    state: tuple[Tensor, ...],
    model_outputs: tuple[Tensor, ...],
    coefficients: StepCoefficients,
    *,
    guidance_scale: float = 1.0,
    noise: tuple[Tensor, ...] = (),
    latent_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """State after the step, ``A z + B m + C eps``.

    Differentiable by ordinary autograd (twice, too); keeps no activation for the backward. Sums are taken in float64
    and rounded once: terms of a multistep row cancel, and float32 sums would be further from the truth than the
    scheduler's own. An entry that the step merely hands on (a row with a single 1) is the same tensor, not a copy.

    Args:
        state: ``n_in`` tensors of one shape, float32 or float64; entry 0 is the latents.
        model_outputs: ``(m,)``, or ``(conditional, unconditional)`` for classifier-free guidance,
            ``m = u + guidance_scale (c - u)``. Any float dtype: cast to the state's first.
        coefficients: the step's numbers.
        guidance_scale: used with two outputs only.
        noise: ``n_noise`` tensors of the state's shape, any float dtype.
        latent_mask: bool or 0/1, broadcastable to the latents: entry 0 changes only where it is true. The other
            entries are not masked.

    Returns:
        ``n_out`` tensors of the state's shape and dtype.

    Raises:
        ValueError: wrong number or shape of tensors.
        TypeError: a state that is neither float32 nor float64.
    """
    _check(state, model_outputs, noise, coefficients)
    dtype = state[0].dtype
    m = model_outputs[0].to(dtype)
    if len(model_outputs) == 2:
        unconditional = model_outputs[1].to(dtype)
        m = unconditional + guidance_scale * (m - unconditional)
    draws = [draw.to(dtype) for draw in noise]
    wide = _Wide()
    result = []
    for row_a, b, row_c in zip(coefficients.A, coefficients.B, coefficients.C, strict=True):
        entry = _combine([*zip(row_a, state, strict=True), (b, m), *zip(row_c, draws, strict=True)], wide)
        result.append(torch.zeros_like(state[0]) if entry is None else entry)
    if latent_mask is not None:
        result[0] = torch.where(as_mask(latent_mask), result[0], state[0])
    return tuple(result)


def solver_step_transpose(
    cotangents: Sequence[Tensor | None],
    coefficients: StepCoefficients,
    *,
    latent_mask: Tensor | None = None,
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Adjoint of :func:`solver_step`: cotangents of the state before the step and of the combined network output.

    Args:
        cotangents: one per output entry; None is zero, missing ones at the end are zero too.
        coefficients: the step's numbers.
        latent_mask: as in the forward.

    Returns:
        ``(A^T cotangents, B . cotangents)``, None where zero.

    Raises:
        ValueError: more cotangents than outputs.
    """
    count = coefficients.num_outputs
    if len(cotangents) > count:
        raise ValueError(f"cotangents: expected at most {count} tensors, got {len(cotangents)}")
    rows: list[Tensor | None] = [*cotangents, *([None] * (count - len(cotangents)))]
    untouched: Tensor | None = None
    x = rows[0]
    if latent_mask is not None and x is not None:
        mask = as_mask(latent_mask)
        untouched = torch.where(mask, torch.zeros_like(x), x)
        rows[0] = torch.where(mask, x, torch.zeros_like(x))
    wide = _Wide()
    into_state = [_combine(zip(column, rows, strict=True), wide) for column in zip(*coefficients.A, strict=True)]
    if untouched is not None:
        into_state[0] = untouched if into_state[0] is None else into_state[0] + untouched
    return tuple(into_state), _combine(zip(coefficients.B, rows, strict=True), wide)
