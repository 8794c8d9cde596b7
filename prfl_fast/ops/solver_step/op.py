"""The solver step as users call it: checks, the choice of the backend, and what needs no kernel at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prfl_fast.ops import backends
from prfl_fast.ops.dtypes import NUMBERS
from prfl_fast.ops.solver_step import reference, triton_backend
from prfl_fast.ops.solver_step.coefficients import StepCoefficients
from prfl_fast.ops.solver_step.registration import MAX_TERMS, define

_STATE_DTYPES = (torch.float32, torch.float64)

define("")  # csrc/ops/solver_step implements it, for CPU and CUDA
define("_triton")
triton_backend.implement()

_OPS = {
    "cpu": (torch.ops.prfl_fast.solver_step, torch.ops.prfl_fast.solver_step_transpose),
    "cuda": (torch.ops.prfl_fast.solver_step, torch.ops.prfl_fast.solver_step_transpose),
    "triton": (torch.ops.prfl_fast.solver_step_triton, torch.ops.prfl_fast.solver_step_transpose_triton),
}


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
    if x.dtype not in _STATE_DTYPES:
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


def _guided_in(asked: torch.dtype | None, outputs: Sequence[torch.dtype], state: torch.dtype) -> torch.dtype:
    """The dtype of guidance's arithmetic for outputs of these dtypes; the state's where there is no guidance."""
    if asked is not None and not asked.is_floating_point:
        raise TypeError(f"guidance_dtype: expected a floating point dtype, got {asked}")
    if len(outputs) < 2:
        return state
    return asked or torch.promote_types(*outputs)


def _backend_for(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], sizes: tuple[int, int]) -> str:
    """The backend for these tensors (the first of the state's dtype), guidance's dtype and others of results, and this
    many terms and results."""
    backend = backends.choose(tensors[0].device)
    if backend == "reference":
        return backend
    device, state = tensors[0].device, tensors[0].dtype
    plain = all(
        t.dtype in NUMBERS and t.device == device and not hasattr(t, "__tensor_flatten__") for t in tensors
    )  # sharded tensors and the like know torch's own ops only
    # Kernels of a float32 state have no float64 guidance: nobody needs it, and it would cost all of them registers.
    known = all(dtype in NUMBERS for dtype in dtypes) and not (dtypes[0] == torch.float64 != state)
    return backend if plain and known and max(sizes) <= MAX_TERMS else "reference"


def solver_step(
    state: tuple[Tensor, ...],
    model_outputs: tuple[Tensor, ...],
    coefficients: StepCoefficients,
    *,
    guidance_scale: float = 1.0,
    guidance_dtype: torch.dtype | None = None,
    noise: tuple[Tensor, ...] = (),
    latent_mask: Tensor | None = None,
    model_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """State after the step, ``A z + B m + C eps``, in one pass over the tensors.

    Differentiable by ordinary autograd (twice, too); keeps no activation for the backward. Sums are taken in float64
    and rounded once: terms of a multistep row cancel, and float32 sums would be further from the truth than the
    scheduler's own. An entry that the step merely hands on (a row with a single 1) is the same tensor, not a copy.

    Backends (:func:`prfl_fast.ops.backend`) agree to the last rounding: they fuse each product with its sum, as torch's
    vectorised loops do, so results differ from plain torch's where that does not, by a unit in the last place of
    float64 per term, which is almost never seen in a float32 state. Tensors with gaps between their elements are
    copied first. Steps of more than 16 terms or results, tensors that hold others (sharded ones), and guidance in
    float64 for a float32 state run in plain torch.

    Args:
        state: ``n_in`` tensors of one shape, float32 or float64; entry 0 is the latents.
        model_outputs: ``(m,)``, or ``(conditional, unconditional)`` for classifier-free guidance,
            ``m = u + guidance_scale (c - u)``. Any float dtype; m is cast to the state's.
        coefficients: the step's numbers.
        guidance_scale: used with two outputs only.
        guidance_dtype: dtype of guidance's arithmetic, each of its three operations rounded to it, and of its
            gradient's; None: the outputs' own (that to which torch promotes both), as pipelines compute that do not
            cast predictions first.
        noise: ``n_noise`` tensors of the state's shape, any float dtype.
        latent_mask: bool or 0/1, broadcastable to the latents: entry 0 changes only where it is true. The other
            entries are not masked.
        model_dtype: also give the new latents in this dtype, for the network's next call.

    Returns:
        ``n_out`` tensors of the state's shape and dtype; with ``model_dtype`` one more, entry 0 in that dtype.

    Raises:
        ValueError: wrong number or shape of tensors.
        TypeError: a state that is neither float32 nor float64; a ``model_dtype`` or ``guidance_dtype`` that is no
            float dtype.
        RuntimeError: the backend that :func:`prfl_fast.ops.backend` names can't run here.
    """
    _check(state, model_outputs, noise, coefficients)
    guided_in = _guided_in(guidance_dtype, [output.dtype for output in model_outputs], state[0].dtype)
    if model_dtype is not None and not model_dtype.is_floating_point:
        raise TypeError(f"model_dtype: expected a floating point dtype, got {model_dtype}")
    x = state[0]
    mask = None if latent_mask is None else as_mask(latent_mask)
    tensors = (*state, model_outputs[0], *noise)
    sizes = (len(tensors), coefficients.num_outputs)
    backend = _backend_for((*tensors, *model_outputs[1:]), (guided_in,), sizes)
    if backend == "reference":
        result = reference.step(state, model_outputs, coefficients, guidance_scale, guided_in, noise, mask)
        copy = None
    else:
        mask = None if mask is None else mask.to(x.device).expand(x.shape)
        guidance = (guidance_scale, guided_in)
        result, copy = _run_step(backend, tensors, model_outputs, coefficients, guidance, mask, model_dtype)
    if model_dtype is not None:
        result.append(result[0].to(model_dtype) if copy is None else copy)
    return tuple(result)


def _run_step(
    backend: str,
    tensors: tuple[Tensor, ...],
    model_outputs: tuple[Tensor, ...],
    coefficients: StepCoefficients,
    guidance: tuple[float, torch.dtype],
    mask: Tensor | None,
    model_dtype: torch.dtype | None,
) -> tuple[list[Tensor], Tensor | None]:
    x, m = tensors[0], coefficients.num_inputs
    guided = len(model_outputs) == 2
    rows = [(*a, b, *c) for a, b, c in zip(coefficients.A, coefficients.B, coefficients.C, strict=True)]
    results: list[Tensor | None] = []
    for number, row in enumerate(rows):
        used = [t for t, coefficient in enumerate(row) if coefficient != 0]
        masked = number == 0 and mask is not None
        only = used[0] if len(used) == 1 and row[used[0]] == 1 else None
        if not used:
            zeros = torch.zeros_like(x)
            results.append(torch.where(mask, zeros, x) if masked and mask is not None else zeros)
        elif only is None or (masked and only != 0) or (guided and only == m) or tensors[only].dtype != x.dtype:
            results.append(None)
        else:
            results.append(tensors[only])
    computed = [number for number, result in enumerate(results) if result is None]
    if not computed:
        return [result for result in results if result is not None], None
    if 0 not in computed:
        mask = None
    columns = [
        t for t in range(len(tensors)) if (t == 0 and mask is not None) or any(rows[r][t] != 0 for r in computed)
    ]
    split = guided and m in columns
    copied = model_dtype in NUMBERS and model_dtype != x.dtype and 0 in computed
    made = _OPS[backend][0](
        [tensors[t] for t in columns],
        model_outputs[1] if split else None,
        mask,
        [rows[r][t] for r in computed for t in columns],
        columns.index(m) if split else -1,
        float(guidance[0]),
        NUMBERS[guidance[1]],
        NUMBERS[x.dtype],
        NUMBERS[model_dtype] if copied and model_dtype is not None else -1,
    )
    for number, tensor in zip(computed, made, strict=False):
        results[number] = tensor
    return [result for result in results if result is not None], made[-1] if copied else None


def solver_step_transpose(
    cotangents: Sequence[Tensor | None],
    coefficients: StepCoefficients,
    *,
    output_dtypes: Sequence[torch.dtype] | None = None,
    guidance_scale: float = 1.0,
    guidance_dtype: torch.dtype | None = None,
    latent_mask: Tensor | None = None,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Adjoint of :func:`solver_step`: cotangents of the state before the step and of the network's outputs.

    Args:
        cotangents: one per output entry; None is zero, missing ones at the end are zero too.
        coefficients: the step's numbers.
        output_dtypes: dtypes of the forward's ``model_outputs``, one or two, in which their cotangents are given;
            empty: none is wanted. None: one, in the cotangents' own.
        guidance_scale, guidance_dtype, latent_mask: as in the forward.

    Returns:
        ``A^T cotangents``, and for the outputs ``(B . cotangents,)`` or, of guidance, ``(s g, g - s g)`` with
        g = B . cotangents. None where zero.

    Raises:
        ValueError: more cotangents than outputs; more than two dtypes.
        TypeError: a ``guidance_dtype`` that is no float dtype.
        RuntimeError: the backend that :func:`prfl_fast.ops.backend` names can't run here.
    """
    count = coefficients.num_outputs
    if len(cotangents) > count:
        raise ValueError(f"cotangents: expected at most {count} tensors, got {len(cotangents)}")
    if output_dtypes is not None and len(output_dtypes) > 2:
        raise ValueError(f"output_dtypes: expected at most 2, got {len(output_dtypes)}")
    given = [*cotangents, *([None] * (count - len(cotangents)))]
    present = [cotangent for cotangent in given if cotangent is not None]
    if not present:
        return (None,) * coefficients.num_inputs, (None,) * (1 if output_dtypes is None else len(output_dtypes))
    mask = None if latent_mask is None else as_mask(latent_mask)
    first = present[0]
    dtypes = (first.dtype,) if output_dtypes is None else tuple(output_dtypes)
    guidance = guidance_scale, _guided_in(guidance_dtype, dtypes, first.dtype)
    backend = _backend_for(present, (guidance[1], *dtypes), (coefficients.num_inputs + 1, count))
    alike = all(t.dtype == first.dtype and t.shape == first.shape for t in present)
    if backend == "reference" or first.dtype not in _STATE_DTYPES or not alike:
        return reference.transpose(given, coefficients, mask, dtypes, *guidance)
    return _run_transpose(backend, given, coefficients, mask, dtypes, guidance)


def _run_transpose(
    backend: str,
    cotangents: list[Tensor | None],
    coefficients: StepCoefficients,
    mask: Tensor | None,
    output_dtypes: tuple[torch.dtype, ...],
    guidance: tuple[float, torch.dtype],
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    x = cotangents[0]
    mask = None if mask is None or x is None else mask.to(x.device).expand(x.shape)
    terms = [(r, cotangent) for r, cotangent in enumerate(cotangents) if cotangent is not None]
    tensors = [tensor for _, tensor in terms]
    own = tensors[0].dtype
    n_in, guided = coefficients.num_inputs, len(output_dtypes) == 2
    columns = [*zip(*coefficients.A, strict=True), *([coefficients.B] if output_dtypes else [])]
    dtypes = [*([own] * n_in), *output_dtypes[:1]]
    results: list[Tensor | None] = [None] * len(columns)
    computed = []
    for number, column in enumerate(columns):
        used = [(r, tensor) for r, tensor in terms if column[r] != 0]
        handed_on = len(used) == 1 and column[used[0][0]] == 1 and not (used[0][0] == 0 and mask is not None)
        if number == 0 and mask is not None:
            computed.append(number)
        elif handed_on and dtypes[number] == own and not (guided and number == n_in):
            results[number] = used[0][1]
        elif used:
            computed.append(number)
    into_unconditional = None
    if computed:
        split = guided and n_in in computed
        made = _OPS[backend][1](
            tensors,
            None,
            mask,
            [columns[number][r] for number in computed for r, _ in terms],
            [NUMBERS[dtypes[number]] for number in computed],
            computed.index(n_in) if split else -1,
            float(guidance[0]),
            NUMBERS[guidance[1]],
            NUMBERS[output_dtypes[1]] if split else -1,
        )
        for number, tensor in zip(computed, made, strict=False):
            results[number] = tensor
        into_unconditional = made[-1] if split else None
    return tuple(results[:n_in]), (*results[n_in:], *([into_unconditional] if guided else []))
