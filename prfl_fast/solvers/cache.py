"""Solvers of schedulers that were seen before: probing costs as much as two of the scheduler's own loops.

The key is the scheduler's whole content by value, so a changed sigma or setting is another scheduler. Solvers are
immutable from outside, so one may serve many chains.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from prfl_fast.solvers.base import Solver
from prfl_fast.solvers.private import RUN_STATE, is_scheduler

AnySolver = TypeVar("AnySolver", bound=Solver)

LIMIT = 8
_solvers: OrderedDict[Hashable, Any] = OrderedDict()
_lock = threading.Lock()
_PLAIN = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, np.dtype)


class _UnknownValueError(Exception):
    pass


def cached(
    kind: type[AnySolver],
    scheduler: Any,
    num_inference_steps: int | None,
    start_step: int,
    make: Callable[[], AnySolver],
) -> AnySolver:
    """What ``make`` gives, or gave for a scheduler of the same content."""
    try:
        key = (kind, _content(scheduler), num_inference_steps, start_step, torch.get_default_dtype())
    except _UnknownValueError:
        return make()
    with _lock:
        if key in _solvers:
            _solvers.move_to_end(key)
            known: AnySolver = _solvers[key]
            return known
    solver = make()
    with _lock:
        _solvers[key] = solver
        while len(_solvers) > LIMIT:
            _solvers.popitem(last=False)
    return solver


def _content(scheduler: Any) -> Hashable:
    """Class, methods and attributes; run state left out, as a private copy leaves it out, but for the begin index."""
    kind = type(scheduler)
    methods = tuple(getattr(kind, name, None) for name in ("step", "set_timesteps", "scale_model_input"))
    values = getattr(scheduler, "__dict__", {})
    kept = {k: v for k, v in values.items() if k not in RUN_STATE or k == "_begin_index"}
    return kind, methods, _frozen(kept)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        data = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        return "tensor", value.dtype, tuple(value.shape), data.numpy().tobytes()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, (float, np.generic)):
        return type(value), repr(value)
    if isinstance(value, (list, tuple, deque)):
        return type(value), tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return type(value), tuple((_frozen(k), _frozen(v)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_frozen(v) for v in value)
    if isinstance(value, type) or type(value) in _PLAIN:
        return type(value), value
    if is_scheduler(value):
        return _content(value)
    raise _UnknownValueError
