"""The one place where the process environment is read; everything else takes arguments."""

from __future__ import annotations

import os
from pathlib import Path

# Set by others (torch, CUDA, the launcher) and worth seeing when a run is slow or a device is missing.
_WORTH_SHOWING = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TRITON_INTERPRET",
    "HF_HUB_OFFLINE",
)


def variables_worth_showing() -> dict[str, str]:
    """Variables of other packages that change how a run behaves and that are set now; prfl_fast itself has none."""
    return {name: os.environ[name] for name in _WORTH_SHOWING if name in os.environ}


def cache_directory() -> Path | None:
    """Where this user's programs keep what can be computed again: XDG_CACHE_HOME or ~/.cache; None without a home."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(chosen):  # the specification has relative paths ignored
        return Path(chosen) / "prfl_fast"
    try:
        return Path.home() / ".cache" / "prfl_fast"
    except RuntimeError:
        return None
