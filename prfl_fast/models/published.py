"""Published video transformers by name: their configs, what surrounds them, and the network itself without weights.

The configs are those of the checkpoints in diffusers' format, written out, so that a plan needs neither a download nor
a weight. A ``config.json`` of the same families is read the same way.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

WAN, HUNYUAN = "WanTransformer3DModel", "HunyuanVideoTransformer3DModel"
LTX, COGVIDEOX = "LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"
CLASSES = (WAN, HUNYUAN, LTX, COGVIDEOX)

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

# Tokens that each family's pipeline pads or cuts the text to.
_TEXT_TOKENS = {WAN: 512, HUNYUAN: 256, LTX: 128, COGVIDEOX: 226}


@dataclass(frozen=True)
class VideoModel:
    """A video transformer's config and what its pipeline puts around it.

    Attributes:
        name: as users type it; of a config file, its path.
        class_name: of the diffusers class.
        config: its keyword arguments.
        spatial, temporal: pixels and frames that become one of the VAE's latents.
        text_tokens: length of the text that the pipeline gives it.
        size: width, height, frames that it was published for.
        guided: its pipeline calls it twice a step, with the text and without.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    spatial: int
    temporal: int
    text_tokens: int
    size: tuple[int, int, int]
    guided: bool

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents that become one token: frames, height, width."""
        size = self.config.get("patch_size", (1, 2, 2) if self.class_name == WAN else 2)
        if isinstance(size, (list, tuple)):
            frames, height, width = size
            return int(frames), int(height), int(width)
        default = 1 if self.class_name == LTX else size
        return int(self.config.get("patch_size_t") or 1), int(default), int(default)

    def latent_grid(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Frames, height and width of the latents of a video.

        Raises:
            ValueError: a size that the VAE's and the patches' factors don't divide.
        """
        patch_t, patch_h, patch_w = self.patch
        for name, value, step in (("width", width, patch_w), ("height", height, patch_h)):
            _check_multiple(name, value, self.spatial * step, 0)
        _check_multiple("frames", frames, self.temporal * patch_t, 1 - self.temporal * (patch_t - 1))
        return (frames - 1) // self.temporal + 1, height // self.spatial, width // self.spatial

    def latents_shape(self, width: int, height: int, frames: int, batch: int = 1) -> tuple[int, ...]:
        """Shape of the latents in the pipeline's layout. Raises ValueError as :meth:`latent_grid` does."""
        grid = self.latent_grid(width, height, frames)
        channels = int(self.config.get("out_channels") or self.config.get("in_channels", 128 if self._ltx else 16))
        if self._ltx:
            return batch, grid[0] * grid[1] * grid[2], channels
        if self.class_name == COGVIDEOX:
            return batch, grid[0], channels, grid[1], grid[2]
        return batch, channels, *grid

    def conditioning(
        self, width: int, height: int, frames: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16
    ) -> dict[str, Any]:
        """Keyword arguments of a call, all zeros, of the shapes that the pipeline gives it."""
        grid = self.latent_grid(width, height, frames)
        text_width = self.config.get({WAN: "text_dim", LTX: "caption_channels"}.get(self.class_name, "text_embed_dim"))
        text = torch.zeros(batch, self.text_tokens, 4096 if text_width is None else text_width, dtype=dtype)
        made: dict[str, Any] = {"encoder_hidden_states": text}
        if self.class_name == HUNYUAN:
            made["encoder_attention_mask"] = torch.ones(batch, self.text_tokens, dtype=torch.bool)
            made["pooled_projections"] = torch.zeros(batch, self.config.get("pooled_projection_dim", 768), dtype=dtype)
            if self.config.get("guidance_embeds", True):
                made["guidance"] = torch.full((batch,), 6000.0, dtype=dtype)
        elif self._ltx:
            made["encoder_attention_mask"] = torch.ones(batch, self.text_tokens, dtype=torch.int64)
            made |= {"num_frames": grid[0], "height": grid[1], "width": grid[2]}
            made["rope_interpolation_scale"] = (self.temporal / 25, self.spatial, self.spatial)
        elif self.class_name == COGVIDEOX and self.config.get("use_rotary_positional_embeddings"):
            patch = self.patch
            tokens = (grid[0] // patch[0]) * (grid[1] // patch[1]) * (grid[2] // patch[2])
            angles = torch.zeros(tokens, int(self.config.get("attention_head_dim", 64)))
            made["image_rotary_emb"] = (angles, angles.clone())
        return made

    def build(self, dtype: torch.dtype = torch.bfloat16, lora: int | None = None) -> nn.Module:
        """The network on the meta device, in the dtypes that ``from_pretrained(torch_dtype=dtype)`` would give it.

        Args:
            dtype: of all but what the class keeps in float32.
            lora: rank of an adapter on the attention's projections, in ``dtype``, beside frozen weights; None: every
                weight is trained.

        Raises:
            ImportError: diffusers is not installed; or, for ``lora``, peft.
            ValueError: a config that its class refuses.
        """
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(
                "a model by name or config needs diffusers: pip install 'prfl-fast[diffusers]'"
            ) from error
        cls: Any = getattr(diffusers, self.class_name)
        try:
            with torch.device("meta"):
                net: nn.Module = cls(**self.config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {self.name}: {self.class_name} refuses this config: {error}") from error
        wide = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
        for name, parameter in net.named_parameters():
            if not wide & set(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        for name, buffer in net.named_buffers():
            # Tables that the class computes stay as they are; those of a checkpoint follow it.
            owner, _, own = name.rpartition(".")
            module = net.get_submodule(owner)
            if buffer.is_floating_point() and own not in module._non_persistent_buffers_set:
                module._buffers[own] = buffer.to(dtype)
        if lora is not None:
            _add_lora(net, lora, dtype)
        return net.eval()

    @property
    def _ltx(self) -> bool:
        return self.class_name == LTX


def _add_lora(net: nn.Module, rank: int, dtype: torch.dtype) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'prfl-fast[diffusers]'") from error
    net.requires_grad_(False)
    adapted: Any = net
    with torch.device("meta"):
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LORA_TARGETS)))
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _check_multiple(name: str, value: int, step: int, offset: int) -> None:
    """``value`` must be ``offset`` more than a positive multiple of ``step`` (of frames one may be all there is)."""
    least = step + offset if offset < 1 else offset
    if value < least or (value - offset) % step:
        more = "" if not offset else f" plus {offset}" if offset > 0 else f" minus {-offset}"
        below = max(least, (value - offset) // step * step + offset)
        near = f"{below} or {below + step}" if value > below else str(below)
        raise ValueError(f"size: expected {name} a multiple of {step}{more}, such as {near}, got {value}")


def parse_size(text: str) -> tuple[int, int, int]:
    """Width, height and frames of ``"1280x720x81"``. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*x\s*(\d+)\s*", text.lower())
    if match is None or not all(map(int, match.groups())):
        raise ValueError(f"size: expected WIDTHxHEIGHTxFRAMES in pixels, such as 1280x720x81, got {text!r}")
    width, height, frames = map(int, match.groups())
    return width, height, frames


def _wan(heads: int, layers: int, ffn: int, channels: int = 16) -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2], "num_attention_heads": heads, "attention_head_dim": 128, "in_channels": channels,
        "out_channels": channels, "text_dim": 4096, "freq_dim": 256, "ffn_dim": ffn, "num_layers": layers,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "image_dim": None,
        "added_kv_proj_dim": None, "rope_max_seq_len": 1024,
    }  # fmt: skip


def _cogvideox(heads: int, layers: int, rotary: bool) -> dict[str, Any]:
    return {
        "num_attention_heads": heads, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16,
        "flip_sin_to_cos": True, "freq_shift": 0, "time_embed_dim": 512, "text_embed_dim": 4096, "num_layers": layers,
        "dropout": 0.0, "attention_bias": True, "sample_width": 90, "sample_height": 60, "sample_frames": 49,
        "patch_size": 2, "temporal_compression_ratio": 4, "max_text_seq_length": 226,
        "activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "norm_elementwise_affine": True,
        "norm_eps": 1e-5, "spatial_interpolation_scale": 1.875, "temporal_interpolation_scale": 1.0,
        "use_rotary_positional_embeddings": rotary,
    }  # fmt: skip


_HUNYUAN = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20,
    "num_single_layers": 40, "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
    "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096, "pooled_projection_dim": 768,
    "rope_theta": 256.0, "rope_axes_dim": [16, 56, 56],
}  # fmt: skip

_LTX = {
    "in_channels": 128, "out_channels": 128, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 32,
    "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28, "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads", "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096,
    "attention_bias": True, "attention_out_bias": True,
}  # fmt: skip

_SIZES = {WAN: (832, 480, 81), HUNYUAN: (1280, 720, 129), LTX: (704, 480, 161), COGVIDEOX: (720, 480, 49)}


def _model(
    name: str, class_name: str, config: Mapping[str, Any], size: tuple[int, int, int] | None = None
) -> VideoModel:
    # Wan 2.2's VAE of 48 channels takes 16 pixels where the one of 16 channels takes 8.
    deep = class_name == WAN and config.get("in_channels") == 48
    return VideoModel(
        name=name,
        class_name=class_name,
        config=MappingProxyType(dict(config)),
        spatial=32 if class_name == LTX else 16 if deep else 8,
        temporal=8 if class_name == LTX else 4,
        text_tokens=int(config.get("max_text_seq_length", _TEXT_TOKENS[class_name])),
        size=size or _SIZES[class_name],
        guided=not (class_name == HUNYUAN and config.get("guidance_embeds", True)),
    )


PUBLISHED: Mapping[str, VideoModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            _model("wan2.1-t2v-1.3b", WAN, _wan(12, 30, 8960)),
            _model("wan2.1-t2v-14b", WAN, _wan(40, 40, 13824), (1280, 720, 81)),
            _model("wan2.2-ti2v-5b", WAN, _wan(24, 30, 14336, 48), (1280, 704, 121)),
            _model("hunyuan-video", HUNYUAN, _HUNYUAN),
            _model("ltx-video", LTX, _LTX),
            _model("cogvideox-2b", COGVIDEOX, _cogvideox(30, 30, False)),
            _model("cogvideox-5b", COGVIDEOX, _cogvideox(48, 42, True)),
        )
    }
)


def video_model(model: str | Path) -> VideoModel:
    """A published model by name, or the model of a ``config.json``, of a model folder or of a pipeline folder.

    Raises:
        ValueError: an unknown name (the nearest one is told), or a config that is not one of :data:`CLASSES`.
        FileNotFoundError: what looks like a path holds no config.
    """
    name = str(model)
    if name.lower() in PUBLISHED:
        return PUBLISHED[name.lower()]
    path = Path(model).expanduser()
    candidates = [path, path / "config.json", path / "transformer" / "config.json"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is not None:
        return _read(found)
    if isinstance(model, Path) or "/" in name or "\\" in name or name.endswith(".json"):
        tried = ", ".join(map(str, candidates))
        raise FileNotFoundError(f"model: no config.json at {path}, which must be local (looked at {tried})")
    near = difflib.get_close_matches(name.lower(), PUBLISHED, 1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"model: expected a path to a config.json or one of {', '.join(PUBLISHED)}, got {name!r}{hint}")


def _read(path: Path) -> VideoModel:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} holds a {type(content).__name__}, expected an object")
    name = content.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"model: {path}: expected a _class_name of {', '.join(CLASSES)}, got {name!r}")
    return _model(str(path), name, {key: value for key, value in content.items() if not key.startswith("_")})
