"""``prfl-fast validate``: every entry read and checked before anything trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prfl_fast.training.data.buckets import Bucket, parse_bucket
from prfl_fast.training.data.dataset import open_items
from prfl_fast.training.data.entry import Entry, references
from prfl_fast.training.data.findings import BadEntryError, Finding, table
from prfl_fast.training.data.index import SETTINGS, read_settings
from prfl_fast.training.data.items import EncodedItem, Item
from prfl_fast.training.data.published import PublishedItem, PublishedOptions

# Dimensions of the latents by pipeline.
_DIMS = {"WanPipeline": 5, "HunyuanVideoPipeline": 5, "LTXPipeline": 3, "CogVideoXPipeline": 5}


@dataclass
class ValidationReport:
    """``entries`` looked at, ``shapes``: how many of each bucket, ``findings``: all that is wrong."""

    path: Path
    entries: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def validate(
    path: str | Path,
    *,
    root: str | Path | None = None,
    caption: str | None = None,
    image: bool | None = None,
    progress: bool = True,
) -> ValidationReport:
    """Read everything that a folder of ``prfl-fast encode``, or a published ``.list``, names.

    Found are: lines and files that are broken or missing, tensors that are not finite, of another shape or dtype than
    their entry says, other than the bytes that were written, or that do not fit the rest: latents whose bucket is none
    of the folder's, entries with other labels or other conditioning than the first.

    Args:
        root, caption, image: of a ``.list``, as in :class:`PublishedOptions`; None: its defaults.

    Raises FileNotFoundError where there is neither, ValueError for options of a ``.list`` beside a folder.
    """
    path = Path(path).expanduser()
    options: dict[str, Any] = {
        name: value for name, value in (("root", root), ("caption", caption), ("image", image)) if value is not None
    }
    if root is not None:
        options["root"] = Path(root).expanduser()
    items, findings = open_items(path, PublishedOptions(**options) if options else None)
    report = ValidationReport(path, len(items), findings=findings)
    if path.is_dir():
        findings += _folder(path, [item.entry for item in items if isinstance(item, EncodedItem)])
    findings += _unlike([*items])
    for item in tqdm(items, unit="entry", disable=not progress, dynamic_ncols=True):
        name = _bucket(item)
        report.shapes[name] = report.shapes.get(name, 0) + 1
        try:
            item.load()
        except BadEntryError as error:
            findings.append(error.about(item.id))
    return report


def describe(report: ValidationReport) -> str:
    """What was found, as a table."""
    shapes = ", ".join(f"{count} of {name}" for name, count in sorted(report.shapes.items()))
    lines = [f"{report.entries} entries in {report.path}: {shapes or 'none'}"]
    lines.append(table(report.findings) if report.findings else "nothing is wrong")
    return "\n".join(lines)


def to_json(report: ValidationReport) -> str:
    """The report as JSON: path, entries, shapes, findings."""
    return json.dumps({**asdict(report), "path": str(report.path)}, indent=2, ensure_ascii=False)


def _bucket(item: Item) -> str:
    if isinstance(item, EncodedItem):
        return str(Bucket(*item.entry.bucket))
    assert isinstance(item, PublishedItem)
    return "x".join(map(str, item.latent_shape))


def _folder(path: Path, entries: list[Entry]) -> list[Finding]:
    """What does not fit the folder's settings."""
    try:
        settings = read_settings(path)
    except ValueError as error:
        return [Finding("broken", "", SETTINGS, str(error))]
    if settings is None:
        return [Finding("missing", "", SETTINGS, "no such file; it says what the folder was encoded with")]
    try:
        buckets = {parse_bucket(text) for text in settings["buckets"]}
        dims = _DIMS[settings["pipeline"]]
    except (KeyError, TypeError, ValueError) as error:
        return [Finding("broken", "", SETTINGS, f"buckets or pipeline: {error}")]
    findings = []
    shapes: dict[tuple[int, int, int], tuple[int, ...]] = {}
    for entry in entries:
        shape = entry.latents.shape
        first = shapes.setdefault(entry.bucket, shape)
        if Bucket(*entry.bucket) not in buckets:
            told = f"bucket {Bucket(*entry.bucket)}: none of {', '.join(settings['buckets'])}"
        elif len(shape) != dims or shape[0] != 1 or 0 in shape:
            told = f"latents {list(shape)}: expected {dims} dimensions, the first of size 1"
        elif shape != first:
            told = f"latents {list(shape)}: others of bucket {Bucket(*entry.bucket)} have {list(first)}"
        elif any(ref.shape[:1] != (1,) for ref in _batched(entry)):
            told = "conditioning: expected tensors whose first dimension has size 1"
        else:
            continue
        findings.append(Finding("mis-shaped", entry.id, entry.latents.shard, told))
    return findings


def _batched(entry: Entry) -> list[Any]:
    return [ref for value in entry.conditioning.values() if not isinstance(value, tuple) for ref in references(value)]


def _unlike(items: list[Item]) -> list[Finding]:
    """Entries whose labels, or names of conditioning, are not those of the most."""
    findings = []

    def labels(item: Item) -> tuple[str, ...]:
        return tuple(sorted(item.labels))

    def conditioning(item: Item) -> tuple[str, ...]:
        return tuple(sorted(item.entry.conditioning)) if isinstance(item, EncodedItem) else ()

    kinds: list[tuple[str, Callable[[Item], tuple[str, ...]]]] = [("labels", labels), ("conditioning", conditioning)]
    for what, names in kinds:
        counts: dict[tuple[str, ...], int] = {}
        for item in items:
            counts[names(item)] = counts.get(names(item), 0) + 1
        usual = max(counts, key=lambda key: counts[key], default=())
        for item in items:
            if names(item) != usual:
                told = f"{what}: {', '.join(names(item)) or 'none'}; most have {', '.join(usual) or 'none'}"
                findings.append(Finding("missing", item.id, "", told))
    return findings
