"""Writes the demo's report: one self-contained ``index.html`` made of the files that a run left in its folder.

It reads files and nothing else, so a report can be written again without training:
``python -m prfl_fast.demo.report out``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from prfl_fast.demo import sections

Json = Mapping[str, Any]


def write_report(output: str | Path, *, study: str | Path | None = None) -> Path:
    """Write ``output/index.html`` from ``summary.json``, ``details.json`` and ``clips.npz`` in that folder.

    ``study`` is the JSON of the long comparison, shown as such with its date and machine; left out when ``None``.
    Returns the page's path. Raises FileNotFoundError when a file of the run is missing, ValueError when one is not
    what it should be.
    """
    folder = Path(output)
    summary, details = _read(folder / "summary.json"), _read(folder / "details.json")
    with np.load(folder / "clips.npz") as archive:
        clips = {key: archive[key] for key in archive.files}
    written = [
        sections.targets(summary),
        sections.clips(details, clips),
        sections.judges(details, summary),
        sections.curves(details),
        sections.reward_and_gradients(details),
        sections.gradient_table(details),
        sections.study(_read(Path(study))) if study is not None else "",
        sections.settings(summary),
    ]
    page = Template(_template("report.html")).substitute(
        title="prfl_fast demo report",
        headline=escape(sections.headline(summary)),
        lead=sections.lead(summary),
        figures=sections.figures(summary),
        sections="\n".join(section for section in written if section),
        footer=sections.footer(summary),
        style=_template("report.css"),
        script=_template("report.js"),
    )
    target = folder / "index.html"
    target.write_text(page, encoding="utf-8")
    return target


def main(arguments: list[str]) -> int:
    """``python -m prfl_fast.demo.report FOLDER [STUDY.json]``: write the report of an earlier run again."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m prfl_fast.demo.report FOLDER [STUDY.json]", file=sys.stderr)
        return 2
    print(write_report(arguments[0], study=arguments[1] if len(arguments) == 2 else None))
    return 0


def _read(path: Path) -> Json:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got a {type(content).__name__}")
    return content


def _template(name: str) -> str:
    return (files("prfl_fast.demo") / "templates" / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
