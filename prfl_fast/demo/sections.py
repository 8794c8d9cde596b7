"""The sections of the demo's report as HTML text, one function each, made of what a run wrote and nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prfl_fast.charts import Mark, Row, Series, dot_chart, line_chart
from prfl_fast.demo.judges import judge
from prfl_fast.demo.pictures import data_uri, grey_png, sprite_sheet

Json = Mapping[str, Any]

# CSS class that gives an arm its colour, the same in every chart; arms without one share "other".
_TONES = {
    "real": "real",
    "good": "real",
    "before": "before",
    "flow_matching": "flow",
    "pixel": "pixel",
    "prfl": "one",
    "full": "full",
}

# Judges: key of the per-seed values, heading, unit of the axis, how to read it.
_JUDGES = (
    ("motion_error", "Motion error", "distance from a smooth path, over speed", "Lower is better."),
    ("structure_error", "Structure error", "deviation of area and shape", "Lower is better."),
    ("net_move", "Net movement", "pixels from first to last frame", "Slow is not smooth: it should not shrink."),
    ("reward", "Reward", "logit at noise level 0", "What training raises. The three judges beside it never see it."),
)


def headline(summary: Json) -> str:
    """One sentence: what became of the motion error, met or not."""
    before, after = summary["motion_error_before"], summary["motion_error_after"]
    if summary["motion_error_after_high"] <= 0.7 * before:
        return f"Motion error fell from {_number(before)} to {_number(after)}, judged on seeds that no training saw"
    if after < before:
        return f"Motion error fell from {_number(before)} to {_number(after)}, less than the target asks"
    return f"Motion error did not fall: {_number(before)} before, {_number(after)} after"


def lead(summary: Json) -> str:
    """Two sentences under the headline: what was done, where, how long."""
    machine = summary["environment"]
    return (
        "A small video model of Wan's architecture has learned moving bodies, good and broken ones alike. A reward "
        "that reads noisy latents then aligns it by <code>prfl_fast.unrolled_sample</code>. "
        f"This run took {_duration(summary['seconds'])} on {machine['cores']} CPU cores."
    )


def figures(summary: Json) -> str:
    """The four figures on top, each with the spread or bound that belongs to it."""
    low, high = summary["win_rate_interval"]
    tiles = [
        (
            "Motion error",
            f"{_number(summary['motion_error_before'])} → {_number(summary['motion_error_after'])}",
            f"upper 95 % bound {_number(summary['motion_error_after_high'])}",
        ),
        (
            "Structure error",
            f"{_number(summary['structure_error_before'])} → {_number(summary['structure_error_after'])}",
            "area and shape of the body",
        ),
        (
            "Reward",
            f"{_number(summary['reward_before'])} → {_number(summary['reward_after'])}",
            f"its accuracy on held-out clips: {_percent(summary['reward_accuracy'])}",
        ),
        (
            "Latent over pixel reward",
            _percent(summary["win_rate_latent_over_rgb"]),
            f"seeds won at equal time; interval {_percent(low)} to {_percent(high)}",
        ),
    ]
    return "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
        for name, value, note in tiles
    )


def targets(summary: Json) -> str:
    """The targets that were set before the run, each with its verdict in words."""
    rows = []
    for target in summary["targets"]:
        verdict = '<span class="met">met</span>' if target["met"] else '<span class="missed">not met</span>'
        rows.append(f"<li>{verdict}<span>{escape(target['sentence'])}</span></li>")
    met = sum(bool(target["met"]) for target in summary["targets"])
    note = "" if not summary["settings"].get("tiny") else _banner(
        "This run was made in the tiny setting: every stage with next to no work. Its numbers mean nothing."
    )
    return _section(
        "Targets",
        f"{note}<p>{met} of {len(rows)} targets that were set before the run are met.</p>"
        f'<div class="card"><ul class="targets">{"".join(rows)}</ul></div>',
    )


def clips(details: Json, pictures: Mapping[str, npt.NDArray[np.uint8]]) -> str:
    """The player: one row of clips per arm, the same seeds in the same columns, all in step."""
    rows = []
    frames = 1
    for arm in details["arms"]:
        shown = pictures.get(arm["key"])
        if shown is None:
            continue
        frames = shown.shape[1]
        paths = judge(torch.from_numpy(shown).float() / 255).centres
        points = json.dumps([[[round(v, 1) for v in point] for point in path] for path in paths.tolist()])
        sheet = data_uri(grey_png(sprite_sheet(shown)))
        error = arm["intervals"]["motion_error"][0]
        label = escape(arm["label"])
        rows.append(
            f'<div class="reel {_tone(arm["key"])}"><div><strong>{label}</strong>'
            f"<small>motion error {_number(error)}</small></div>"
            f'<div><canvas data-count="{len(shown)}" data-paths="{points}" data-sheet="{sheet}" role="img" '
            f'aria-label="{len(shown)} clips: {label}"></canvas>'
            f'<noscript><img src="{sheet}" alt="{len(shown)} clips, a row each: {label}"></noscript></div></div>'
        )
    controls = (
        '<div class="controls"><button type="button">Pause</button>'
        f'<label>Frame <input type="range" min="0" max="{frames - 1}" value="0"></label>'
        '<label><input type="checkbox"> Tracked path</label></div>'
    )
    return _section(
        "Before and after, same seeds",
        "<p>In the models' rows each column starts from the same noise. Clips were taken in the order of their seeds, "
        "none was picked.</p>"
        f'<div class="card player">{controls}{"".join(rows)}</div>',
    )


def judges(details: Json, summary: Json) -> str:
    """Dot charts of the judges: every seed, the mean, its bootstrap interval, the target."""
    cards = []
    for key, heading, unit, reading in _JUDGES:
        arms = [arm for arm in details["arms"] if key in arm["per_seed"]]
        if not arms:
            continue
        rows = [
            Row(arm["label"], _tone(arm["key"]), arm["per_seed"][key], *arm["intervals"][key]) for arm in arms
        ]
        marks = []
        if key == "motion_error":
            marks = [Mark(0.7 * summary["motion_error_before"], "target")]
        if key == "net_move":
            marks = [Mark(0.8 * summary["net_move_before"], "least")]
        chart = dot_chart(rows, title=f"{heading} per arm", x_label=unit, marks=marks, from_zero=key != "reward")
        cards.append(f'<div class="card"><h3>{heading}</h3><p class="note">{reading}</p>{chart}</div>')
    seeds = max(len(arm["per_seed"]["motion_error"]) for arm in details["arms"])
    head = ["Arm", "Updates", "Training", "Motion error", "Structure error", "Net movement", "Speed", "Diversity"]
    body = [
        [
            arm["label"],
            _maybe(arm.get("updates"), str),
            _maybe(arm.get("train_seconds"), _duration),
            *(
                _number(arm["intervals"][key][0]) if key in arm["intervals"] else "–"
                for key in ("motion_error", "structure_error", "net_move", "speed")
            ),
            _maybe(arm.get("diversity"), _number),
        ]
        for arm in details["arms"]
    ]
    return _section(
        "What the judges say",
        f"<p>The judges look at decoded pixels of {seeds} held-out seeds and share nothing with the rewards. A dot is "
        "a seed; the bar is the mean with its 95 % bootstrap interval.</p>"
        f'<div class="pair">{"".join(cards)}</div>'
        f'<div class="pair wide"><div class="card scroll" tabindex="0">{_table(head, body)}</div></div>',
    )


def curves(details: Json) -> str:
    """Learning curves of every arm over training time, and those of base model and reward when they were trained."""
    cards = []
    labels = {arm["key"]: arm["label"] for arm in details["arms"]}
    for field, times, heading, unit in (
        ("reward", "seconds", "Reward of the samples that training drew", "logit, mean of ten updates"),
        ("motion_error", "watched_seconds", "Motion error during training", "on seeds set aside for this curve"),
        ("loss", "seconds", "Loss", "mean of ten updates"),
    ):
        series = [
            Series(labels[key], _tone(key), curve[times], curve[field])
            for key, curve in details["curves"].items()
            if key in labels and any(value is not None for value in curve[field])
        ]
        if series:
            chart = line_chart(series, title=heading, x_label="training seconds", y_label=unit)
            cards.append(f'<div class="card"><h3>{heading}</h3>{chart}</div>')
    for key, heading in (("base", "Base model: flow-matching loss"), ("reward_model", "Reward model: loss")):
        curve = details["curves"].get(key)
        if curve and curve.get("loss"):
            chart = line_chart(
                [Series(heading, "other", curve["updates"], curve["loss"])],
                title=heading, x_label="updates", y_label="loss",
            )  # fmt: skip
            cards.append(f'<div class="card"><h3>{heading}</h3>{chart}</div>')
    if not cards:
        return ""
    return _section("Learning curves", f'<div class="pair">{"".join(cards)}</div>')


def reward_and_gradients(details: Json) -> str:
    """Reward accuracy against noise level, and how much gradient each denoising step receives."""
    accuracy = details["reward_accuracy"]
    left = line_chart(
        [Series("held-out accuracy", "full", accuracy["sigma"], accuracy["accuracy"])],
        title="Reward accuracy against noise level",
        x_label="noise level sigma",
        y_label="accuracy",
        marks=[Mark(0.5, "chance")],
        y_from=0.4,
        y_to=1.0,
        points=True,
    )
    labels = {arm["key"]: arm["label"] for arm in details["arms"]}
    norms = details["gradient_norms"]
    right = line_chart(
        [
            Series(labels.get(key, key), _tone(key), list(range(len(values))), [_or_nan(v) for v in values])
            for key, values in norms.items()
        ],
        title="Gradient norm per denoising step",
        x_label="denoising step (0 is the noisiest)",
        y_label="norm",
        log_y=True,
        points=True,
    )
    return _section(
        "Where the signal is",
        '<div class="pair">'
        '<div class="card"><h3>Reward accuracy against noise level</h3>'
        f'<p class="note">Held-out clips, {accuracy["count"]} per level. 0 is a clean latent, 1 is noise.</p>'
        f"{left}</div>"
        '<div class="card"><h3>Gradient norm per denoising step</h3>'
        f'<p class="note">Of the loss with respect to the prediction of each step, root mean square over the updates '
        f"that reached it.</p>{right}</div></div>",
    )


def gradient_table(details: Json) -> str:
    """What each gradient mode costs and how close it comes to the exact gradient, measured in the same run."""
    head = ["Gradient", "Network calls", "Seconds", "Peak memory", "Cosine to exact", "Norm ratio"]
    rows = details["gradient_table"]
    most = max(row["peak_bytes"] for row in rows)
    body = []
    for row in rows:
        share = 100 * row["peak_bytes"] / most
        body.append(
            [
                escape(row["mode"]),
                str(row["calls"]),
                f"{row['seconds']:.2f}",
                f'{_bytes(row["peak_bytes"])}<span class="meter" style="width:{share:.0f}%"></span>',
                _maybe(row.get("cosine"), lambda value: f"{value:.4f}"),
                _maybe(row.get("norm_ratio"), lambda value: f"{value:.3f}"),
            ]
        )
    return _section(
        "What an exact gradient costs",
        "<p>One rollout and its backward for each mode, same model, same noise, measured in this run. Plain autograd "
        "keeps every step's graph; the full chain keeps one latent a step and calls the network again.</p>"
        f'<div class="card scroll" tabindex="0">{_table(head, body, safe=True)}</div>',
    )


def study(content: Json) -> str:
    """The committed long comparison, marked as another run than this one."""
    tables = []
    for table in content["tables"]:
        tables.append(
            f'<h3>{escape(table["title"])}</h3><p class="note">{escape(table.get("note", ""))}</p>'
            f'<div class="card scroll" tabindex="0">{_table(table["head"], table["rows"])}</div>'
        )
    return _section(
        "The long comparison",
        f'<p class="banner">Not of this run: made on {escape(str(content["date"]))} on '
        f"{escape(str(content['machine']))}, in {_duration(content['seconds'])}, from commit "
        f"<code>{escape(str(content['commit']))}</code>; repeat it with <code>prfl-fast demo --study</code>.</p>"
        f"{''.join(tables)}",
    )


def settings(summary: Json) -> str:
    """Every setting of the run, folded away."""
    text = escape(json.dumps(summary["settings"], indent=2, default=str))
    return f"<section><details><summary>Settings of this run</summary><pre>{text}</pre></details></section>"


def footer(summary: Json) -> str:
    """Where and with what the run was made."""
    rows = "".join(
        f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in summary["environment"].items()
    )
    source = "All figures of this page are in <code>summary.json</code> and <code>details.json</code>."
    return f"<dl>{rows}</dl><p>{source}</p>"


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _banner(text: str) -> str:
    return f'<div class="banner"><p>{escape(text)}</p></div>'


def _table(head: Sequence[str], body: Sequence[Sequence[Any]], *, safe: bool = False) -> str:
    """A table; the first column holds row headers. ``safe`` cells are HTML already."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    rows = []
    for row in body:
        cells = [str(cell) if safe else escape(str(cell)) for cell in row]
        rows.append(
            f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>"
        )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _tone(key: str) -> str:
    return _TONES.get(key, "other")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _maybe(value: Any, show: Any) -> str:
    return "–" if value is None else str(show(value))


def _number(value: float) -> str:
    """Three significant digits, never in scientific notation for what a judge measures."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
