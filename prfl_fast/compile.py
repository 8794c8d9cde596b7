"""`prfl-fast compile`: every production launch of the Triton kernels compiled without a GPU, and what came out."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}

# To fit one more block on a multiprocessor the assembler parks a word at the beginning of a program and fetches it at
# the end: one write and one read of the stack, which cost nothing. More than that is spilled in a loop.
PARKED = 2


def compile_kernels(
    architectures: Sequence[str] = tuple(ARCHITECTURES),
    ops: Sequence[str] | None = None,
    report: str | Path | None = None,
    *,
    names: Iterable[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Compile the kernels that production models launch (:mod:`prfl_fast.kernels.configurations`), each once.

    Args:
        architectures: among ``sm_80``, ``sm_90``, ``sm_100``.
        ops: public ops, None: all.
        report: a JSON file to write; after an interrupt it holds what was done until then.
        names: launches as ``"op: name"``, None: all.
        progress: show a bar.

    Returns:
        ``{"triton": version, "complete": bool, "kernels": [...]}``, a row per kernel and architecture: ``arch``,
        ``launches`` (op and name of each launch that runs it), and the fields of
        :class:`prfl_fast.kernels.ahead_of_time.Compiled`.

    Raises:
        ValueError: an architecture or op that is not there, or Triton's interpreter is on.
        ImportError: triton is not installed.
        FileNotFoundError: this build of Triton has no cuobjdump.
    """
    if not architectures or any(name not in ARCHITECTURES for name in architectures):
        raise ValueError(f"arch: expected some of {', '.join(ARCHITECTURES)}, got {', '.join(architectures) or 'none'}")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("triton is not installed (pip install triton)")
    from triton import __version__ as version
    from triton import knobs

    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    from prfl_fast.kernels import ahead_of_time

    ahead_of_time.tool()
    jobs = _jobs(architectures, ops, None if names is None else set(names))
    result: dict[str, Any] = {"triton": version, "complete": False, "kernels": []}
    try:
        with ahead_of_time.private_cache(), tqdm(total=len(jobs), disable=not progress, unit="kernel") as bar:
            for arch, launches, arguments in jobs:
                bar.set_description(f"{arch} {launches[0]}")
                made = ahead_of_time.compile_kernel(*arguments)
                result["kernels"].append({"arch": arch, "launches": launches, **asdict(made)})
                bar.update()
        result["complete"] = True
    finally:
        if report is not None:
            _write(Path(report), result)
    return result


def summary(result: dict[str, Any]) -> str:
    """A table with a line per kernel, and what spills."""
    lines = [f"{'arch':7}{'registers':>10}{'shared':>8}{'stack':>7}{'mma':>5}{'copies':>8}{'seconds':>9}  kernel"]
    for row in result["kernels"]:
        more = len(row["launches"]) - 1
        lines.append(
            f"{row['arch']:7}{row['registers']:10}{row['shared']:8}{row['stack']:7}{row['tensor_core']:5}"
            f"{sum(row['copies'].values()):8}{row['seconds']:9.2f}  {row['kernel']}, {row['launches'][0]}"
            + (f" and {more} more" if more else "")
        )
    spill = len(spilling(result))
    lines.append(f"{len(result['kernels'])} kernels by Triton {result['triton']}, {spill} spill registers")
    return "\n".join(lines)


def spilling(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of kernels that keep more on the stack than a word for the length of a program."""
    return [row for row in result["kernels"] if row["spills"] > PARKED]


def _jobs(
    architectures: Sequence[str], ops: Sequence[str] | None, names: set[str] | None
) -> list[tuple[str, list[str], tuple[Any, ...]]]:
    """Architecture, launches and arguments of each distinct kernel."""
    from prfl_fast.kernels import ahead_of_time, configurations

    jobs: dict[tuple[str, ...], tuple[str, list[str], tuple[Any, ...]]] = {}
    for arch in architectures:
        launches = configurations.production(ARCHITECTURES[arch])
        known = sorted({launch.op for launch in launches})
        if unknown := [op for op in ops or () if op not in known]:
            raise ValueError(f"op: expected some of {', '.join(known)}, got {', '.join(unknown)}")
        if names is not None and (missing := names - {_label(launch) for launch in launches}):
            raise ValueError(f"names: no launch is called {', '.join(sorted(missing))}")
        for launch in launches:
            if (ops and launch.op not in ops) or (names is not None and _label(launch) not in names):
                continue
            for kernel, args, kwargs in ahead_of_time.recorded(launch):
                source, target, options = ahead_of_time.prepare(kernel, args, kwargs, ARCHITECTURES[arch])
                key = (arch, source.name, source.hash(), repr(sorted(options.items(), key=str)))
                _, said, _ = jobs.setdefault(key, (arch, [], (source, target, options)))
                if _label(launch) not in said:
                    said.append(_label(launch))
    return list(jobs.values())


def _label(launch: Any) -> str:
    return f"{launch.op}: {launch.name}"


def _write(path: Path, result: dict[str, Any]) -> None:
    """One line per kernel, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in result.items() if key != "kernels"}
    rows = ",\n".join(json.dumps(row) for row in result["kernels"])
    text = json.dumps(head)[:-1] + ', "kernels": [\n' + rows + "\n]}\n"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
