"""The published PRFL checkpoints: a Wan backbone under the original code's names, and two pickles of the head."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prfl_fast.reward.files import read_tensors

_FILES = "diffusion_pytorch_model*.safetensors"

# Names of the original Wan code and those of diffusers' class, without ".weight" and ".bias".
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in (_ATTENTION | _IMAGE).items()},
    "norm3": "norm2",  # the one norm that has weights stands third there and second here
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def renamed(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The backbone's tensors under diffusers' names. Raises ValueError for names that the table does not have."""
    result, unknown = {}, []
    for name, tensor in tensors.items():
        match = _IN_BLOCK.fullmatch(name)
        table, prefix, inner = (_BLOCK, f"blocks.{match[1]}.", match[2]) if match else (_OUTSIDE, "", name)
        stem, dot, kind = inner.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, dot, kind = inner, "", ""
        if stem in table:
            result[f"{prefix}{table[stem]}{dot}{kind}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{where}: unexpected {', '.join(sorted(unknown)[:4])} ({len(unknown)} names)")
    return result


def config_of(tensors: Mapping[str, Tensor], head_dim: int, where: Path) -> dict[str, Any]:
    """The trunk's config, depth and sizes read from names and shapes.

    Raises ValueError when a tensor that tells one is missing, or when the blocks are not numbered from 0 on.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in tensors:
            raise ValueError(f"{where}: missing {name}; expected the original Wan names")
        return tuple(tensors[name].shape)

    dim, channels, *patch = shape("patch_embedding.weight")
    numbers = {int(match[1]) for match in map(_IN_BLOCK.fullmatch, tensors) if match}
    if numbers != set(range(len(numbers))) or not numbers:
        raise ValueError(f"{where}: expected blocks numbered 0, 1, ..., got {sorted(numbers)}")
    if dim % head_dim:
        raise ValueError(f"attention_head_dim: expected a divisor of the width {dim} of {where}, got {head_dim}")
    image = "img_emb.proj.1.weight" in tensors
    sizes = {
        "patch_size": patch,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": channels,  # of the head, which a trunk does not have
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "num_layers": len(numbers),
        "cross_attn_norm": "blocks.0.norm3.weight" in tensors,
        "image_dim": shape("img_emb.proj.1.weight")[1] if image else None,
        "added_kv_proj_dim": dim if "blocks.0.cross_attn.k_img.weight" in tensors else None,
        "pos_embed_seq_len": shape("img_emb.emb_pos")[1] if "img_emb.emb_pos" in tensors else None,
    }
    return {"class_name": "WanTransformer3DModel", "transformer": sizes}


def read_backbone(path: Path) -> tuple[dict[str, Tensor], Path]:
    """All tensors of a file, or of a folder's ``diffusion_pytorch_model*.safetensors``, and where they lay."""
    found = [path] if path.is_file() else sorted(path.glob(_FILES))
    if not found:
        raise FileNotFoundError(f"backbone: no {_FILES} in {path}")
    tensors: dict[str, Tensor] = {}
    for file in found:
        part = read_tensors(file)
        twice = sorted(tensors.keys() & part.keys())
        if twice:
            raise ValueError(f"{file}: {twice[0]} is in another file of the folder too")
        tensors.update(part)
    return tensors, path


def read_head(path: Path, argument: str, allow_pickle: bool) -> dict[str, Tensor]:
    """Named tensors of one file of the head."""
    if not path.is_file():
        raise FileNotFoundError(f"{argument}: no such file: {path}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if not allow_pickle:
        raise ValueError(
            f"{argument}: {path} is a pickle; from a source that you trust, allow_pickle=True reads it by "
            "torch.load(weights_only=True)"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{argument}: {path} holds more than tensors, or is damaged: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{argument}: {path}: expected a dictionary of tensors, got {type(content).__name__}")
    return content
