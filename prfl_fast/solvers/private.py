"""A private copy of the user's scheduler, on the CPU, with its timesteps set and no history."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prfl_fast.solvers.adapters import adapted, evaluations
from prfl_fast.solvers.refused import refuse_unsupported

# What diffusers' schedulers change while they step. A scheduler that ran a pipeline before has all of it stale, graphs
# and large tensors included, so none of it is copied.
RUN_STATE = (
    "_begin_index",
    "_step_index",
    "counter",
    "cur_model_output",
    "cur_sample",
    "derivatives",
    "dt",
    "ets",
    "is_scale_input_called",
    "last_noise",
    "last_sample",
    "lower_order_nums",
    "mid_point_sigma",
    "model_outputs",
    "noise_sampler",
    "prev_derivative",
    "sample",
    "this_corrector_order",
    "this_order",
    "this_predictor_order",
    "timestep_list",
)


@dataclass(frozen=True)
class PrivateScheduler:
    """The copy, ready for the step ``start_step``.

    Attributes:
        scheduler: the copy.
        timesteps: ``[N]``, CPU, the scheduler's own dtype.
        offset: position of step 0 in the scheduler's ``sigmas`` (not 0 where the caller cut the timesteps' head off).
        start_step: the first step to run.
    """

    scheduler: Any
    timesteps: Tensor
    offset: int
    start_step: int


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
        return type(value)(_copied(v) for v in value)
    if is_scheduler(value):
        return copy_scheduler(value)
    return copy.deepcopy(value)


def is_scheduler(value: Any) -> bool:
    """True for a scheduler inside a scheduler (UniPC's ``solver_p``)."""
    return not isinstance(value, type) and callable(getattr(value, "step", None)) and hasattr(value, "config")


def copy_scheduler(scheduler: Any) -> Any:
    """A copy on the CPU: everything but the run state, which comes fresh from an instance of the same configuration."""
    kind: Any = type(scheduler)
    fresh = vars(kind.from_config(scheduler.config))
    result = kind.__new__(kind)
    for name, value in vars(scheduler).items():
        if name not in RUN_STATE:
            result.__dict__[name] = _copied(value)
        elif name not in fresh:
            # Made by set_timesteps only; empty means None there (Heun's dt).
            result.__dict__[name] = None
    result.__dict__.update({name: fresh[name] for name in RUN_STATE if name in fresh})
    return result


def _set_timesteps(scheduler: Any, num_inference_steps: int) -> None:
    try:
        scheduler.set_timesteps(num_inference_steps, device="cpu")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"num_inference_steps={num_inference_steps}: {type(scheduler).__name__}.set_timesteps refused it "
            f"({error}). Call scheduler.set_timesteps(...) yourself with what it needs (mu=..., sigmas=...) and pass "
            "num_inference_steps=None"
        ) from error


def _cut_off(scheduler: Any, begin: int | None, count: int) -> int:
    """Steps cut off the head of ``timesteps`` by the caller, who then says so by set_begin_index."""
    sigmas = getattr(scheduler, "sigmas", None)
    return begin if begin and sigmas is not None and len(sigmas) == begin + count + 1 else 0


def private_scheduler(scheduler: Any, num_inference_steps: int | None, start_step: int) -> PrivateScheduler:
    """Copies ``scheduler``, which stays as it is.

    With ``num_inference_steps=None`` timesteps and sigmas are those that the caller's ``set_timesteps`` left (custom
    sigmas, mu), but without the history of any run; a begin index that was set counts only where the timesteps were
    cut to match it: ``start_step`` says where to begin.

    Raises:
        TypeError: no diffusers scheduler, or one that is refused by name.
        ValueError: timesteps never set, refused by ``set_timesteps``, or ``start_step`` out of range.
    """
    refuse_unsupported(scheduler)
    name = type(scheduler).__name__
    missing = [a for a in ("config", "from_config", "set_timesteps", "step") if not hasattr(scheduler, a)]
    if missing or isinstance(scheduler, type):
        without = f" (without {', '.join(missing)})" if missing else ""
        raise TypeError(f"scheduler: expected an instance of a diffusers scheduler, got {name}{without}")
    private = copy_scheduler(scheduler)
    kind: Any = type(scheduler)
    private.__class__ = adapted(kind)
    begin = None
    if num_inference_steps is not None:
        if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: expected a whole number from 1, got {num_inference_steps!r}")
        _set_timesteps(private, num_inference_steps)
    elif getattr(private, "num_inference_steps", None) is None:
        raise ValueError(
            "num_inference_steps: None means the timesteps that scheduler.set_timesteps has set, but it was never "
            f"called on this {name}"
        )
    else:
        begin = getattr(scheduler, "_begin_index", None)
    timesteps = torch.as_tensor(private.timesteps).detach().to("cpu", copy=True)
    timesteps = timesteps[: evaluations(type(scheduler), len(timesteps))]
    count = len(timesteps)
    if not 0 <= start_step < count:
        raise ValueError(f"start_step: expected a step in 0..{count - 1}, got {start_step}")
    # A two-evaluation method lists its second evaluations between the first ones; it can't begin with one.
    order = getattr(private, "order", 1)
    if start_step % order:
        raise ValueError(f"start_step: {name} makes {order} evaluations a step; expected a multiple, got {start_step}")
    offset = _cut_off(private, begin, count)
    if hasattr(private, "set_begin_index"):
        private.set_begin_index(offset + start_step)
    return PrivateScheduler(private, timesteps, offset, start_step)
