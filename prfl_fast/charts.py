"""Charts as SVG text, without a library: lines, and dots with intervals; inline in a page, or a picture of its own.

Colours are CSS variables, so that a page's themes restyle them; :func:`picture` brings a style of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 14.0, 12.0, 40.0


@dataclass(frozen=True)
class Series:
    """One named line. ``tone`` is the CSS class that colours it; ``low`` and ``high`` are a band around ``y``."""

    label: str
    tone: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    dashed: bool = False


@dataclass(frozen=True)
class Row:
    """One row of a dot chart: every value, their mean and its interval."""

    label: str
    tone: str
    values: Sequence[float]
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Mark:
    """A labelled reference line at ``value`` on the value axis."""

    value: float
    label: str


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    y_from: float | None = None,
    y_to: float | None = None,
    log_y: bool = False,
    points: bool = False,
    width: float = 520,
    height: float = 280,
    legend: bool = True,
) -> str:
    """A line chart with axes, grid, an optional band per series, and a legend below (HTML, unless ``legend`` is off).

    ``title`` is what a screen reader says. ``log_y`` drops points that are not positive. Raises ValueError when no
    series has a finite point.
    """
    kept = [_finite(one, positive=log_y) for one in series]
    xs = [x for one in kept for x in one.x]
    ys = [v for one in kept for v in (*one.y, *one.low, *one.high)] + [mark.value for mark in marks]
    if not xs:
        raise ValueError(f"series: no finite point to draw in {title!r}")
    x_axis = _Axis(min(xs), max(xs), _LEFT, width - _RIGHT)
    y_axis = _Axis(
        min(ys) if y_from is None else y_from,
        max(ys) if y_to is None else y_to,
        height - _BOTTOM,
        _TOP,
        log=log_y,
        round_out=y_from is None and y_to is None,
    )
    parts = [_grid(x_axis, y_axis, x_label, y_label, width, height)]
    parts += [_horizontal_mark(mark, y_axis, width) for mark in marks]
    for one in kept:
        if one.low:
            edge = [*zip(one.x, one.high, strict=True), *reversed(list(zip(one.x, one.low, strict=True)))]
            parts.append(f'<polygon class="band {one.tone}" points="{_points(edge, x_axis, y_axis)}"/>')
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        path = _points(list(zip(one.x, one.y, strict=True)), x_axis, y_axis)
        parts.append(f'<polyline class="line {one.tone}"{dashes} points="{path}"/>')
        if points or len(one.x) == 1:
            parts += [
                f'<circle class="dot {one.tone}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3">'
                f"<title>{escape(one.label)}: {_tick(x)}, {_tick(y)}</title></circle>"
                for x, y in zip(one.x, one.y, strict=True)
            ]
    keys = "".join(
        f'<span class="key {one.tone}{" dashed" if one.dashed else ""}"><i></i>{escape(one.label)}</span>'
        for one in kept
        if len(kept) > 1 and legend
    )
    return _svg(parts, title, width, height) + (f'<div class="legend">{keys}</div>' if keys else "")


def dot_chart(
    rows: Sequence[Row],
    *,
    title: str,
    x_label: str,
    marks: Sequence[Mark] = (),
    from_zero: bool = True,
    width: float = 520,
) -> str:
    """One row of dots per arm with the mean and its interval above them; the value axis runs left to right.

    Values beyond four times the median of the upper quartiles are drawn at the right edge as open dots, so that one
    outlier does not squeeze the rest; the axis label says how many. Raises ValueError when there are no rows.
    """
    if not rows:
        raise ValueError(f"rows: nothing to draw in {title!r}")
    row_height, left = 46.0, 152.0
    height = _TOP + row_height * len(rows) + _BOTTOM
    quartiles = sorted(sorted(row.values)[(3 * len(row.values)) // 4] for row in rows if row.values)
    limit = 4 * quartiles[len(quartiles) // 2] if quartiles else math.inf
    needed = [row.high for row in rows] + [mark.value for mark in marks]
    limit = max([limit, *(1.05 * value for value in needed)]) if limit > 0 else math.inf
    shown = [min(v, limit) for row in rows for v in row.values] + needed + [row.low for row in rows]
    axis = _Axis(min([0.0, *shown]) if from_zero else min(shown), max(shown), left, width - _RIGHT, round_out=True)
    base = height - _BOTTOM
    beyond = sum(v > limit for row in rows for v in row.values)
    label = f"{x_label} ({beyond} beyond the axis)" if beyond else x_label
    parts = []
    for value in axis.ticks():
        x = axis(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{base:.1f}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 16:.1f}" text-anchor="middle">{_tick(value)}</text>')
    middle = (left + width - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle:.1f}" y="{height - 5:.1f}" text-anchor="middle">{escape(label)}</text>'
    )
    for mark in marks:
        x = axis(mark.value)
        parts.append(f'<line class="mark" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{base:.1f}"/>')
        anchor, shift = ("end", -4) if x > width * 0.7 else ("start", 4)
        parts.append(
            f'<text class="mark-label" x="{x + shift:.1f}" y="{_TOP + 8}" text-anchor="{anchor}">'
            f"{escape(mark.label)}</text>"
        )
    for index, row in enumerate(rows):
        middle = _TOP + row_height * (index + 0.5)
        parts.append(
            f'<text class="row-label {row.tone}" x="{left - 10:.1f}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(row.label)}</text>"
        )
        for number, value in enumerate(row.values):
            # A fixed scatter (golden ratio), the same in every chart: the same seed sits at the same height.
            offset = ((number * 0.6180339887) % 1 - 0.5) * row_height * 0.5
            kind = "open" if value > limit else "faint"
            parts.append(
                f'<circle class="dot {kind} {row.tone}" cx="{axis(min(value, limit)):.1f}" '
                f'cy="{middle + offset:.1f}" r="2.4"/>'
            )
        parts.append(
            f'<g class="interval {row.tone}"><title>{escape(row.label)}: {row.mean:.3g} '
            f"({row.low:.3g} to {row.high:.3g})</title>"
            f'<line x1="{axis(row.low):.1f}" y1="{middle:.1f}" x2="{axis(row.high):.1f}" y2="{middle:.1f}"/>'
            f'<rect x="{axis(row.mean) - 2.5:.1f}" y="{middle - 8:.1f}" width="5" height="16" rx="2"/></g>'
        )
    return _svg(parts, title, width, height)


TONES = ("full", "one", "pixel", "other", "flow", "before", "real")

_STYLE = """
svg { --paper: #fbfaf7; --ink: #1d2126; --soft: #5b626c; --rule: #dedbd3; --grid: #ebe8e1; }
text { font: 12px system-ui, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); }
.paper { fill: var(--paper); } .heading { font-size: 14px; font-weight: 600; fill: var(--ink); }
.grid { stroke: var(--grid); } .axis { stroke: var(--rule); } .tick { font-size: 11px; }
.mark { stroke: var(--ink); stroke-dasharray: 2 3; opacity: .7; } .mark-label { font-size: 11px; fill: var(--ink); }
.line { fill: none; stroke: var(--tone); stroke-width: 2; stroke-linejoin: round; }
.band { fill: var(--tone); opacity: .16; }
.dot { fill: var(--tone); } .dot.faint { opacity: .38; } .dot.open { fill: none; stroke: var(--tone); }
.interval line { stroke: var(--ink); stroke-width: 2.5; }
.interval rect { fill: var(--tone); stroke: var(--ink); stroke-width: 1.5; } .row-label { fill: var(--ink); }
.full { --tone: #0b7a58; } .one { --tone: #2563b8; } .pixel { --tone: #c2410c; } .other { --tone: #8b3f9e; }
.flow { --tone: #9a7200; } .before { --tone: #5b626c; } .real { --tone: #8a8f98; }
"""


def picture(panels: Sequence[tuple[str, str]], legend: Sequence[Series] = (), *, columns: int = 1) -> str:
    """A file of its own: panels ``(heading, chart)`` in rows of ``columns``, charts without HTML, one legend below.

    The legend shows the lines of ``legend``, which need no points.
    """
    sizes = [tuple(map(float, chart.split('viewBox="0 0 ', 1)[1].split('"', 1)[0].split())) for _, chart in panels]
    width = max(w for w, _ in sizes)
    parts, top, legend_height = [], 8.0, 24.0 * math.ceil(len(legend) / (3 * columns))
    for first in range(0, len(panels), columns):
        row = range(first, min(first + columns, len(panels)))
        for column, index in enumerate(row):
            heading, chart = panels[index]
            left, (w, h) = 8 + column * (width + 24), sizes[index]
            parts.append(f'<text class="heading" x="{left + 4:g}" y="{top + 16:g}">{escape(heading)}</text>')
            place = f'<svg x="{left:g}" y="{top + 22:g}" width="{w:g}" height="{h:g}" '
            parts.append(place + chart.removeprefix("<svg "))
        top += 22 + max(sizes[index][1] for index in row) + 14
    total = 16 + columns * width + (columns - 1) * 24
    for number, one in enumerate(legend):
        x = 20 + number % (3 * columns) * (total - 20) / (3 * columns)
        y = top + 14 + 24 * (number // (3 * columns))
        dashes = ' stroke-dasharray="5 4"' if one.dashed else ""
        parts.append(f'<path class="line {one.tone}"{dashes} d="M{x:g} {y - 4:g}h24"/>')
        parts.append(f'<text x="{x + 31:g}" y="{y:g}">{escape(one.label)}</text>')
    height = top + legend_height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:g} {height:g}" width="{total:g}" '
        f'height="{height:g}"><style>{_STYLE}</style><rect class="paper" width="100%" height="100%"/>'
        f"{''.join(parts)}</svg>\n"
    )


@dataclass(frozen=True)
class _Axis:
    """Maps ``low..high`` to pixels ``start..end``; ``round_out`` widens the range to whole ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    round_out: bool = False

    def __call__(self, value: float) -> float:
        low, high = self._range()
        position = (math.log10(value) if self.log else value) - low
        return self.start + (self.end - self.start) * position / (high - low)

    def ticks(self) -> list[float]:
        low, high = self._range()
        if self.log:
            return [10.0**power for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
        step = _step(high - low)
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _range(self) -> tuple[float, float]:
        if self.log:
            return math.floor(math.log10(self.low)), max(
                math.ceil(math.log10(self.high)), math.floor(math.log10(self.low)) + 1
            )
        if self.low == self.high:
            pad = abs(self.low) or 1.0
            return self.low - pad / 2, self.high + pad / 2
        if not self.round_out:
            return self.low, self.high
        step = _step(self.high - self.low)
        return math.floor(self.low / step + 1e-9) * step, math.ceil(self.high / step - 1e-9) * step


def _step(span: float) -> float:
    """A tick distance of 1, 2 or 5 times a power of ten that gives four to eight ticks over ``span``."""
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)


def _finite(series: Series, *, positive: bool) -> Series:
    keep = [i for i, y in enumerate(series.y) if math.isfinite(y) and (y > 0 or not positive)]

    def pick(values: Sequence[float]) -> list[float]:
        return [float(values[i]) for i in keep] if values else []

    return Series(
        series.label, series.tone, pick(series.x), pick(series.y), pick(series.low), pick(series.high), series.dashed
    )


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, width: float, height: float) -> str:
    base, parts = height - _BOTTOM, []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{width - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    for value in x_axis.ticks():
        x = x_axis(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{base}" x2="{x:.1f}" y2="{base + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{_tick(value)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{base}" x2="{width - _RIGHT}" y2="{base}"/>')
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text class="label" transform="translate(11 {(_TOP + base) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    return "".join(parts)


def _horizontal_mark(mark: Mark, axis: _Axis, width: float) -> str:
    y = axis(mark.value)
    return (
        f'<line class="mark" x1="{_LEFT}" y1="{y:.1f}" x2="{width - _RIGHT}" y2="{y:.1f}"/>'
        f'<text class="mark-label" x="{width - _RIGHT}" y="{y - 5:.1f}" text-anchor="end">{escape(mark.label)}</text>'
    )


def _points(pairs: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    return " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in pairs)


def _svg(parts: Sequence[str], title: str, width: float, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _tick(value: float) -> str:
    """A number as short as it can be read: 0.25, 1.5, 20, 3k, 1e-5."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    size = abs(value)
    if size >= 10000:
        return f"{value / 1000:g}k"
    if size < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"
