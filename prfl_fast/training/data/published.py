"""The layout of the published PRFL data: a ``.list`` of meta files, each naming ``.npy`` files of a Wan model.

latents.npy      [1, 16, F, h, w]         normalised latents
text.npy         [1, L, 4096]             UMT5's states, L tokens; padded with zeros, as Wan's text is
f1_black.npy     [1, 16 | 20, F, h, w]    image to video: latents of the first frame and black, maybe with their mask
img_clip.npy     [1, S, D]                image to video: CLIP's states of the first frame
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prfl_fast.training.data.findings import BadEntryError, Finding, Kind
from prfl_fast.training.data.items import Content
from prfl_fast.training.data.tensors import check_finite

LABELS = ("text_alignment", "blur_quality", "physics_quality", "human_quality")
_WORDS = {"good": 1.0, "poor": 0.0}
# The names that the published code takes for one thing, the first that is there.
_LATENTS = ("video_vae_latent_path", "vae_latent_path", "latents_path")
_TEXT = {
    "short": (("textshort_path", "text_en_path"), ("short_caption", "prompt")),
    "long": (("textlong_path", "text_en_path"), ("long_caption", "prompt")),
}
_CONDITION = ("f1_black_path", "latents_condition_path")
_IMAGE = ("image_embeds", "imgclip_path")


@dataclass(frozen=True)
class PublishedOptions:
    """How a ``.list`` is read.

    Attributes:
        root: the folder that all files must lie in; relative paths are taken from it. None: the list's own.
        caption: "short" or "long".
        text_length: tokens that text is padded to; longer text is an error.
        image: read the condition and CLIP's states of an image-to-video model too.
    """

    root: Path | None = None
    caption: str = "short"
    text_length: int = 512
    image: bool = False


@dataclass(frozen=True)
class PublishedItem:
    """One meta file; its shapes are known from the headers of its arrays."""

    id: str
    prompt: str
    labels: dict[str, float]
    arrays: dict[str, Path]
    latent_shape: tuple[int, ...]
    options: PublishedOptions

    def shapes(self) -> str:
        return json.dumps([list(self.latent_shape), self.options.text_length, sorted(self.arrays)])

    def load(self) -> Content:
        tensors = {name: _load(path) for name, path in self.arrays.items()}
        for name, tensor in tensors.items():
            _check_shape(name, tuple(tensor.shape), self.arrays[name], self.options)
        latents, text = tensors["latents"], tensors["text"]
        file = str(self.arrays["latents"])
        if tuple(latents.shape) != self.latent_shape:
            told = f"{list(latents.shape)}, expected {list(self.latent_shape)} as when it was first seen"
            raise BadEntryError("mis-shaped", file, told)
        conditioning = {"encoder_hidden_states": F.pad(text, (0, 0, 0, self.options.text_length - text.shape[1]))}
        if not self.options.image:
            return Content(latents, conditioning)
        condition = tensors["condition"]
        if condition.shape[2:] != latents.shape[2:]:
            told = f"{list(condition.shape)}, expected the frames and sizes of latents {list(latents.shape)}"
            raise BadEntryError("mis-shaped", str(self.arrays["condition"]), told)
        return Content(latents, {**conditioning, "encoder_hidden_states_image": tensors["image"]}, condition)


def read_list(path: Path, options: PublishedOptions) -> tuple[list[PublishedItem], list[Finding]]:
    """The items of a ``.list`` that can be used, and what is wrong with the others. Blank lines are skipped."""
    root = (path.parent if options.root is None else options.root).resolve()
    items: dict[str, PublishedItem] = {}
    findings: list[Finding] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name = line.strip()
        if not name:
            continue
        if name in items:
            findings.append(Finding("broken", name, str(path), "named twice"))
            continue
        try:
            items[name] = _item(name, root, options)
        except BadEntryError as error:
            findings.append(error.about(name))
    if not items and not findings:
        findings.append(Finding("missing", "", str(path), "names no meta file"))
    return list(items.values()), findings


def _item(name: str, root: Path, options: PublishedOptions) -> PublishedItem:
    meta_path = _inside(name, root)
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadEntryError("missing", name, "no such file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadEntryError("broken", name, f"not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise BadEntryError("broken", name, "expected an object")
    texts, captions = _TEXT[options.caption]
    fields = {"latents": _LATENTS, "text": texts}
    if options.image:
        fields |= {"condition": _CONDITION, "image": _IMAGE}
    arrays = {part: _inside(_field(meta, names, name), root) for part, names in fields.items()}
    shapes = {part: _shape(path) for part, path in arrays.items()}
    for part, shape in shapes.items():
        _check_shape(part, shape, arrays[part], options)
    return PublishedItem(name, _field(meta, captions, name), _labels(meta, name), arrays, shapes["latents"], options)


def _field(meta: dict[str, Any], names: tuple[str, ...], file: str) -> str:
    value = next((meta[name] for name in names if meta.get(name)), None)
    if not isinstance(value, str):
        raise BadEntryError("missing", file, f"has no {' or '.join(names)}")
    return value


def _labels(meta: dict[str, Any], file: str) -> dict[str, float]:
    """Labels that are there, and motion quality: that of physics and of people both."""
    labels = {}
    for name in LABELS:
        value = meta.get(name)
        if value is None:
            continue
        value = _WORDS.get(value, value) if isinstance(value, str) else value
        if isinstance(value, (bool, str)) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadEntryError("broken", file, f"{name}: expected 0, 1, good or poor, got {meta[name]!r}")
        labels[name] = float(value)
    if "physics_quality" in labels and "human_quality" in labels:
        labels["motion_quality"] = min(labels["physics_quality"], labels["human_quality"])
    return labels


def _inside(name: str, root: Path) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise BadEntryError("broken", name, f"lies outside {root}; give the folder that holds all files as root")
    return path


def _shape(path: Path) -> tuple[int, ...]:
    """The shape in an array's header; the data stays on the disk."""
    return tuple(_open(path, "r").shape)


def _load(path: Path) -> Tensor:
    tensor = torch.from_numpy(_open(path, None))
    check_finite(tensor, str(path), "array")
    return tensor


def _open(path: Path, mode: Any) -> Any:
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except FileNotFoundError as error:
        raise BadEntryError("missing", str(path), "no such file") from error
    except (OSError, ValueError, EOFError) as error:
        raise BadEntryError("broken", str(path), f"not an array of numbers, or cut short: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float16, np.float64):
        raise BadEntryError("broken", str(path), "expected one array of floating-point numbers")
    return array


def _check_shape(part: str, shape: tuple[int, ...], path: Path, options: PublishedOptions) -> None:
    """Raises where a shape can't be that of the layout."""
    kind: Kind = "mis-shaped"
    dims = 3 if part in ("text", "image") else 5
    if len(shape) != dims or shape[0] != 1 or 0 in shape:
        expected = "[1, tokens, width]" if dims == 3 else "[1, channels, frames, height, width]"
        raise BadEntryError(kind, str(path), f"{part}: {list(shape)}, expected {expected}")
    if part == "text" and shape[1] > options.text_length:
        raise BadEntryError(kind, str(path), f"text: {shape[1]} tokens, expected up to {options.text_length}")
