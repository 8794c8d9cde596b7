"""Runs benchmarks one after the other and keeps what is measured, row by row."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prfl_fast.benchmarks import record
from prfl_fast.benchmarks.measure import threads
from prfl_fast.benchmarks.registry import Benchmark, Row, Setting, choose

Report = dict[str, Any]
Say = Callable[[str], None]

_WHO = ("shape", "dtype", "direction", "backend", "peer")


def setting_for(device: str = "auto", seconds: float = 1.0, tiny: bool = False) -> Setting:
    """The setting with the device looked up: ``"auto"`` is the GPU where there is one.

    Raises:
        ValueError: a device that is not here; seconds that are not above zero.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds: expected a number above zero, got {seconds}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and (kind == "cpu" or not index.isdecimal())):
        raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise ValueError(f"device: expected one of the {count} CUDA devices here, got {device!r}")
    return Setting(device, seconds, tiny)


def run(
    names: Sequence[str],
    setting: Setting,
    reports: list[Report],
    *,
    output: str | Path | None = None,
    show: Say = print,
    tell: Say = print,
) -> None:
    """Runs the named benchmarks, or all that the device can run.

    Args:
        names: see :func:`prfl_fast.benchmarks.registry.choose`, which also tells the errors.
        setting: from :func:`setting_for`.
        reports: one is appended per benchmark and filled row by row. Its status is ``"partial"`` until the last row
            is there, so that an interruption leaves what was measured.
        output: folder for ``<name>_<device>.json``, written again after each row.
        show: gets each row as a line.
        tell: gets what goes on.
    """
    chosen = choose(names, setting.kind)
    for number, benchmark in enumerate(chosen, 1):
        tell(f"[{number}/{len(chosen)}] {benchmark.name} on {setting.device}: {benchmark.measures}")
        with threads(1 if benchmark.one_thread else None):
            _run_one(benchmark, setting, reports, None if output is None else Path(output), show, tell)


def failed(reports: Sequence[Report]) -> bool:
    """True where a row says that something was wrong."""
    return any("wrong" in row for report in reports for row in report["rows"])


def line(row: Row) -> str:
    """A row for the terminal."""
    who = "  ".join(str(row[key]) for key in _WHO if key in row)
    for reason in ("absent", "wrong"):
        if reason in row:
            return f"  {who or row.get('way', '')}: {reason.upper() if reason == 'wrong' else reason}: {row[reason]}"
    if "median_us" in row:
        spread = f"{row['median_us']:.4g} us ({row['p20_us']:.4g} to {row['p80_us']:.4g})"
        return f"  {who}: {spread}, {row['share_of_copy_speed']:.1%} of the copy speed"
    return "  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items())


def _run_one(
    benchmark: Benchmark, setting: Setting, reports: list[Report], output: Path | None, show: Say, tell: Say
) -> None:
    device, before = torch.device(setting.device), record.load_now()
    suffix = "" if benchmark.on_host else f"_{record.slug(device)}"
    path = None if output is None else output / f"{benchmark.name}{suffix}.json"
    report: Report = {
        "benchmark": benchmark.name,
        "measures": benchmark.measures,
        "status": "partial",
        "tiny": setting.tiny,
        "about": record.about(device) | {"load": record.load(before)},
        "rows": [],
    }
    reports.append(report)

    def keep() -> None:
        report["about"]["load"] = record.load(before)
        if path is not None:
            record.write(report, path)

    try:
        for row in _rows(benchmark, setting, report):
            report["rows"].append(row)
            show(line(row))
            keep()
        report["status"] = "complete"
    finally:
        keep()
        if path is not None:
            tell(f"{path}: {report['status']}, {len(report['rows'])} rows")


def _rows(benchmark: Benchmark, setting: Setting, report: Report) -> Iterator[Row]:
    missing = [name for name in benchmark.needs if importlib.util.find_spec(name) is None]
    if missing:
        yield {"absent": f"{', '.join(missing)} not installed; pip install 'prfl-fast[diffusers]'"}
        return
    module = benchmark.load()
    report["details"] = module.details(setting)
    yield from module.rows(setting)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + ")"
    return str(value)
