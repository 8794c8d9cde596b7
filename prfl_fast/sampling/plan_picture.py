"""The curve of budget against time, for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prfl_fast.charts import Mark, Series, line_chart, picture
from prfl_fast.memory.iteration_plan import CurvePoint, IterationPlan, gib, seconds

_BAR = 40


def terminal_curve(plan: IterationPlan) -> str:
    """One line per budget: bytes, time, and a bar as long as the time; empty without a curve."""
    if not plan.curve:
        return ""
    longest = max(point.total_ns for point in plan.curve)
    width = max(len(gib(point.budget_bytes)) for point in plan.curve)
    lines = [f"{'budget':>{width}}  {'iteration':>10}"]
    for point in plan.curve:
        bar = "#" * max(1, round(_BAR * point.total_ns / max(1, longest)))
        lines.append(f"{gib(point.budget_bytes):>{width}}  {seconds(point.total_ns):>10}  {bar}")
    return "\n".join(lines)


def write_curve(plan: IterationPlan, path: str | Path) -> None:
    """The curve as an SVG file.

    Raises:
        ValueError: another ending than ``.svg`` (nothing here writes pixels), or a plan without a curve.
        OSError: the file can't be written.
    """
    path = Path(path)
    check_picture(path)
    if not plan.curve:
        raise ValueError("curve: expected a plan with some budgets (plan_memory(curve=12)), got one without")
    path.write_text(_drawn(plan, plan.curve), encoding="utf-8")


def check_picture(path: str | Path) -> None:
    """Raises ValueError for another ending than ``.svg``."""
    if Path(path).suffix.lower() != ".svg":
        raise ValueError(f"curve: expected a file that ends in .svg, the one format that is written, got {str(path)!r}")


def _drawn(plan: IterationPlan, curve: Sequence[CurvePoint]) -> str:
    in_minutes = max(point.total_ns for point in curve) > 120e9
    unit, scale = ("minutes", 60e9) if in_minutes else ("seconds", 1e9)
    line = Series(
        "planned", "full", [point.budget_bytes / 2**30 for point in curve], [point.total_ns / scale for point in curve]
    )
    marks = []
    if plan.recompute_all_ns is not None:
        marks.append(Mark(plan.recompute_all_ns / scale, "every block recomputed"))
    chart = line_chart(
        [line],
        title=f"Time of one iteration against the memory budget, {plan.model}",
        x_label="budget per GPU, GiB",
        y_label=f"{unit} per iteration (estimate, {plan.device})",
        marks=marks,
        points=True,
        legend=False,
    )
    shape = " x ".join(map(str, plan.latents_shape))
    return picture([(f"{plan.model}, latents {shape}", chart)])
