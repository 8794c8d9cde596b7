"""What is installed here, what is missing, and what that costs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import prfl_fast
from prfl_fast._env import variables_worth_showing
from prfl_fast.exactness import GradientCheck, check_gradients
from prfl_fast.memory.solver.chain import missing_core
from prfl_fast.ops import library
from prfl_fast.ops.attention import choice

# Distribution, import name, extra that brings it, what is lost without it.
_OPTIONAL = (
    ("diffusers", "diffusers", "diffusers", "no model families and no schedulers: plain callables only"),
    ("transformers", "transformers", "diffusers", "pipeline_inputs(prompt=...) cannot encode prompts"),
    ("peft", "peft", "diffusers", "no LoRA: training updates whole weights"),
    ("accelerate", "accelerate", "diffusers", "diffusers loads checkpoints slowly and with a second copy in memory"),
    ("av", "av", "video", "videos cannot be read: prfl-fast demo --clips does not work"),
    ("triton", "triton", "", "torch.compile of CUDA code does not work (it comes with CUDA builds of torch)"),
    ("flash-attn", "flash_attn", "attention", "diffusers lacks its backends of that name; torch's own is used"),
    ("xformers", "xformers", "attention", "diffusers lacks its backend of that name; torch's own is used"),
)

# cuDNN's attention returned wrong values for lengths that are no multiple of 128 before this release.
_CUDNN_ATTENTION_RIGHT_SINCE = 91501


@dataclass(frozen=True)
class Package:
    """One optional package: its version here (None: missing), the extra that installs it, what is lost without it."""

    name: str
    version: str | None
    extra: str
    cost: str


@dataclass(frozen=True)
class Findings:
    """All that the doctor saw; ``healthy`` is False when something needed is broken or a gradient is not exact."""

    versions: dict[str, str]
    devices: list[str]
    packages: list[Package]
    variables: dict[str, str]
    compiled: dict[str, str]
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    gradients: GradientCheck | None = None
    attention: dict[str, str] = field(default_factory=dict)
    attention_measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Nothing needed is broken, and the gradient check passed or was not asked for."""
        return not self.problems and (self.gradients is None or self.gradients.passed)


def examine(*, gradients: bool = False, model: str | Path | None = None) -> Findings:
    """Look at this machine; with ``gradients`` also run :func:`prfl_fast.exactness.check_gradients` on ``model``.

    Warnings that prfl_fast itself gives meanwhile (a fallback announced, say) are kept as notices.
    Raises what :func:`prfl_fast.exactness.check_gradients` raises for a model it cannot read.
    """
    packages = [_package(*row) for row in _OPTIONAL]
    problems = [f"{p.name}: {p.version}" for p in packages if p.version and p.version.startswith("broken")]
    check = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in prfl_fast.__all__:
            getattr(prfl_fast, name)  # imports every room: a fallback taken at import time is announced here
        measured = choice.rankings()  # a broken file of them is announced here
        if gradients:
            check = check_gradients(model)
    ours = str(Path(prfl_fast.__file__).parent)
    notices = sorted({str(w.message) for w in caught if w.filename.startswith(ours)})
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if cudnn is not None and cudnn < _CUDNN_ATTENTION_RIGHT_SINCE:
        notices.append(
            f"cuDNN {_cudnn_name(cudnn)} is older than {_cudnn_name(_CUDNN_ATTENTION_RIGHT_SINCE)}: its attention is"
            " wrong for lengths that are no multiple of 128; install a newer nvidia-cudnn, or disable that backend of"
            " torch's SDPA"
        )
    return Findings(
        _versions(cudnn), _devices(), packages, variables_worth_showing(), _compiled(), problems, notices, check,
        choice.installed(), measured,
    )  # fmt: skip


def render(findings: Findings) -> str:
    """The findings as text for a terminal."""
    lines = [f"{name:<10} {value}" for name, value in findings.versions.items()]
    lines += [f"{'device':<10} {device}" for device in findings.devices]
    lines += [f"{name}={value}" for name, value in findings.variables.items()]
    lines += ["", "compiled parts"]
    lines += [f"  {name:<13} {state}" for name, state in findings.compiled.items()]
    lines += ["", "optional packages"]
    for package in findings.packages:
        if package.version is not None:
            lines.append(f"  {package.name:<13} {package.version}")
            continue
        remedy = f"; pip install 'prfl-fast[{package.extra}]'" if package.extra else ""
        lines.append(f"  {package.name:<13} missing: {package.cost}{remedy}")
    lines += ["", "attention kernels, in the order in which they are taken where nothing was measured"]
    lines += [f"  {name:<15} {state}" for name, state in findings.attention.items()]
    lines += ["", "attention kernels by measurement, fastest first"]
    lines += [line for measured in findings.attention_measured.items() for line in _ranking(*measured)] or ["  none"]
    lines += ["", "fallbacks and warnings announced so far"]
    lines += [f"  {notice}" for notice in findings.notices] or ["  none"]
    lines += [f"PROBLEM: {problem}" for problem in findings.problems]
    if findings.gradients is not None:
        lines += ["", findings.gradients.render()]
    return "\n".join(lines)


def _ranking(bucket: str, entry: dict[str, Any]) -> list[str]:
    times = entry["microseconds"]
    order = [f"{name} {times[name]} us" if name in times else name for name in entry["order"]]
    return [f"  {bucket}: {', '.join(order) or 'none'}", *(f"    {n} {why}" for n, why in entry["wrong"].items())]


def to_json(findings: Findings) -> str:
    """The findings as JSON, field by field, with ``healthy`` beside them."""
    content: dict[str, Any] = dataclasses.asdict(findings)
    content["healthy"] = findings.healthy
    if findings.gradients is not None:
        content["gradients"]["passed"] = findings.gradients.passed
    return json.dumps(content, indent=2)


def _versions(cudnn: int | None) -> dict[str, str]:
    versions = {"prfl_fast": prfl_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda is not None:
        versions["CUDA"] = torch.version.cuda
    if cudnn is not None:
        versions["cuDNN"] = _cudnn_name(cudnn)
    driver = _driver()
    if driver is not None:
        versions["driver"] = driver
    return versions


def _compiled() -> dict[str, str]:
    """What was built when the package was installed, and how to get what was not."""
    ops, without = library.COMPILED, "not built: the same in Python runs instead"
    if ops is None:
        kernels = f"not built; {library.REMEDY}"
    elif not ops.cuda:
        kernels = f"not built ({ops.reason}); {library.REMEDY}"
    else:
        kernels = f"for {', '.join(ops.archs)} (nvcc {ops.cuda})"
    planner = missing_core()
    twin = f"not there ({planner}): the same in Python runs instead, slower and on hard chains with larger gaps"
    return {
        "CPU ops": f"{without}; {library.REMEDY_CPU}" if ops is None else "built",
        "CUDA kernels": kernels,
        "planner core": "built" if planner is None else f"{twin}; {library.REMEDY_CPU}",
    }


def _devices() -> list[str]:
    machine = platform.processor() or platform.machine()
    devices = [f"cpu: {machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no device answers"
        return [*devices, f"no CUDA device: {reason}"]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index}: {card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.1f} GiB")
    return devices


def _package(name: str, module: str, extra: str, cost: str) -> Package:
    if importlib.util.find_spec(module) is None:
        return Package(name, None, extra, cost)
    # In a child process: an import is slow, may warn, and a broken binary package may take the interpreter with it.
    child = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    if child.returncode != 0:
        reason = (child.stderr.strip().splitlines() or ["no message"])[-1]
        return Package(name, f"broken: import fails with {reason}", extra, cost)
    try:
        return Package(name, importlib.metadata.version(name), extra, cost)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, "unknown version", extra, cost)


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    lines = answer.stdout.split() if answer.returncode == 0 else []
    return lines[0] if lines else "unknown: nvidia-smi fails"


def _cudnn_name(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
