"""A reward model as ``config.json`` and ``model.safetensors``; loading that names the file and every wrong tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prfl_fast.models import Trunk, trunk_from_config

if TYPE_CHECKING:
    from prfl_fast.reward.model import LatentRewardModel

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_CLASS = "LatentRewardModel"
_KEYS = {"_class_name", "shared", "num_heads", "num_blocks", "trunk", "table_dtypes"}


def save(model: LatentRewardModel, folder: Path) -> None:
    """Write both files, each complete or not at all."""
    from safetensors.torch import save_file

    config = {
        "_class_name": _CLASS,
        "shared": model.shared,
        "num_heads": model.query_attention.multihead_attn.num_heads,
        "num_blocks": model.num_blocks,
        "trunk": model.trunk.config,
        "table_dtypes": {name: str(table.dtype).removeprefix("torch.") for name, table in _tables(model)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    partial = folder / f"{WEIGHTS}.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, folder / CONFIG)


def read_config(folder: Path) -> dict[str, Any]:
    """The checked config of a saved model."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder that save_pretrained wrote")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("_class_name") != _CLASS:
        raise ValueError(f"{path}: expected the config of a {_CLASS}")
    if set(config) != _KEYS:
        wrong = ", ".join(sorted(set(config) ^ _KEYS))
        raise ValueError(f"{path}: missing or unexpected: {wrong}")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return load_file(path)


def empty_trunk(config: dict[str, Any]) -> Trunk:
    """A trunk whose parameters take no memory until they are loaded."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError("loading a reward model needs accelerate: pip install 'prfl-fast[diffusers]'") from error

    with init_empty_weights(include_buffers=False):
        return trunk_from_config(config)


def load(module: nn.Module, sources: Mapping[Path, Mapping[str, Tensor]], prefix: str) -> None:
    """Give ``module`` the tensors of ``sources``, whose names lack ``prefix``; they keep their dtypes.

    Raises ValueError with file and names when a tensor is missing, unexpected or of another shape.
    """
    expected = module.state_dict()
    found = {prefix + name: tensor for tensors in sources.values() for name, tensor in tensors.items()}
    problems = []
    missing = sorted(name.removeprefix(prefix) for name in expected.keys() - found.keys())
    if missing:
        problems.append(f"missing {_few(missing)}")
    unexpected = sorted(name.removeprefix(prefix) for name in found.keys() - expected.keys())
    if unexpected:
        problems.append(f"unexpected {_few(unexpected)}")
    for name in sorted(expected.keys() & found.keys()):
        if expected[name].shape != found[name].shape:
            shapes = f"{tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            problems.append(f"{name.removeprefix(prefix)}: shape {shapes}")
    if problems:
        raise ValueError(f"{', '.join(map(str, sources))}: {'; '.join(problems)}")
    module.load_state_dict(found, assign=True)


def restore_tables(model: nn.Module, dtypes: Mapping[str, str]) -> None:
    """Round the tables as they were rounded: a fresh trunk makes them wider than a cast model had them."""
    tables = _tables(model)
    if {name for name, _ in tables} != set(dtypes):
        raise ValueError(f"{CONFIG}: table_dtypes: expected {[name for name, _ in tables]}, got {sorted(dtypes)}")
    for name, table in tables:
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = table.to(getattr(torch, dtypes[name]))


def _tables(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that are made anew and not saved: rotary and positional tables."""
    saved = model.state_dict().keys()
    return [(n, b) for n, b in model.named_buffers() if n not in saved and b.is_floating_point()]


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
