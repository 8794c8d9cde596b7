"""Which implementation an op runs: the best that is there, unless the caller names one."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prfl_fast.ops.library import COMPILED, REMEDY, REMEDY_CPU

BACKENDS = ("cuda", "triton", "cpu", "reference")

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# Plain module state, not a context variable: torch.compile guards on it.
_chosen: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Ops inside run on the named backend, for tests and comparisons; without it each op takes the best that is there.

    A gradient runs on the backend of its forward, wherever the backward is called. An op that has no such backend at
    all (plain torch ops) is not affected. With ``TRITON_INTERPRET=1`` in the environment before triton is imported,
    ``"triton"`` runs on CPU tensors. The choice holds for all threads of the process.

    Args:
        name: ``"cuda"`` and ``"cpu"`` (compiled), ``"triton"``, or ``"reference"`` (plain torch).

    Raises:
        ValueError: another name.
        RuntimeError: from an op that is called inside: the backend is not there, or not for the tensors' device.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    global _chosen
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def triton_interprets() -> bool:
    """True where Triton kernels run on the CPU, in its interpreter."""
    if not _HAS_TRITON:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def chosen() -> str | None:
    """The backend that :func:`backend` names now."""
    return _chosen


_covered: dict[int | None, bool] = {}


def _covers(index: int | None) -> bool:
    """True where the compiled CUDA kernels run on this card."""
    if index not in _covered:
        _covered[index] = COMPILED is not None and COMPILED.covers(*torch.cuda.get_device_capability(index))
    return _covered[index]


def _why_not(name: str, device: torch.device) -> str | None:
    """Why the backend can't run on the device; None where it can."""
    if name == "reference":
        return None
    if name == "triton":
        if not _HAS_TRITON:
            return "triton is not installed (pip install triton)"
        if device.type == "cuda" or (device.type == "cpu" and triton_interprets()):
            return None
        return f"the tensors are on {device.type} (TRITON_INTERPRET=1 runs Triton on the CPU)"
    if device.type != name:
        return f"the tensors are on {device.type}"
    if COMPILED is None:
        return f"the package was installed without compiled ops; {REMEDY_CPU if name == 'cpu' else REMEDY}"
    if name == "cuda" and not COMPILED.cuda:
        return f"CUDA kernels were not built: {COMPILED.reason}; {REMEDY}"
    if name == "cuda" and not _covers(device.index):
        return f"CUDA kernels were built for {' '.join(COMPILED.archs)} only; rebuild with PRFL_CUDA_ARCHS"
    return None


def choose(device: torch.device) -> str:
    """The backend for tensors on ``device``: the one that :func:`backend` names, else the best that is there.

    Raises:
        RuntimeError: the named backend cannot run there.
    """
    if _chosen is not None:
        reason = _why_not(_chosen, device)
        if reason is not None:
            raise RuntimeError(f"backend: {_chosen!r} was asked for, but {reason}")
        return _chosen
    if device.type == "cpu":
        return "cpu" if COMPILED is not None else "reference"
    if device.type != "cuda":
        return "reference"
    return next(name for name in ("cuda", "triton", "reference") if _why_not(name, device) is None)
