"""What every benchmark's JSON tells beside its figures: device, driver, versions, commit, load."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import prfl_fast
from prfl_fast.ops.library import COMPILED

_PACKAGES = ("triton", "diffusers", "numpy")
# Other programs' share of the machine above which times are no longer those of an idle one.
_BUSY = 0.3


def about(device: torch.device) -> dict[str, Any]:
    """The machine and the software as they are now."""
    versions: dict[str, str | None] = {
        "prfl_fast": prfl_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    told: dict[str, Any] = {
        "device": device_name(device),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions | {name: _version(name) for name in _PACKAGES},
        "commit": commit(),
        "compiled_ops": None if COMPILED is None else {"nvcc": COMPILED.cuda or None, "archs": list(COMPILED.archs)},
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        told |= {
            "driver": _driver(),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
        }
    return told


def device_name(device: torch.device) -> str:
    """The card's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def slug(device: torch.device) -> str:
    """The device as part of a file's name: ``cpu``, or the card as ``nvidia_h200``."""
    return "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "_", device_name(device).lower()).strip("_")


def load_now() -> float:
    """Programs that want to run, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def load(before: float) -> dict[str, Any]:
    """The load before and now, and whether other programs ran on the machine (this one is not counted)."""
    now = load_now()
    others = max(before, now - torch.get_num_threads())
    told: dict[str, Any] = {"at_start": before, "now": now}
    if others > _BUSY:
        told["note"] = "the machine is shared: other programs ran meanwhile, and times are longer than on an idle one"
    return told


def commit(file: Path = Path(__file__)) -> str | None:
    """Commit of the checkout that ``file`` belongs to, with a + where its code was changed; None outside of one."""
    if shutil.which("git") is None:
        return None
    folder = file.parent
    # An installed package may lie in somebody else's repository, whose commit says nothing.
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return None
    head = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--", ":/prfl_fast", ":/csrc")
    return None if head is None else head + ("+" if changed else "")


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON, whole or not at all: a run that is stopped leaves the rows written before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(path)


def _git(folder: Path, *words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
    )
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.split() else None
