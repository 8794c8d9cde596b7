"""A tiny twin of a video transformer: class, switches and channels as in its config, next to no width and depth."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_HEADS = 2
_HEAD_DIM = 12  # divides into three rotary axes of even size, for every family
_TEXT_TOKENS = 5
_TEXT_DIM = 16
_FRAMES, _HEIGHT, _WIDTH = 2, 2, 3  # in patches

# What each family's class calls its sizes, and how small they can be together.
_SIZES: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        "num_attention_heads": _HEADS,
        "attention_head_dim": _HEAD_DIM,
        "num_layers": 2,
        "ffn_dim": 32,
        "text_dim": _TEXT_DIM,
        "freq_dim": 16,
    },
    "HunyuanVideoTransformer3DModel": {
        "num_attention_heads": _HEADS,
        "attention_head_dim": _HEAD_DIM,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": _TEXT_DIM,
        "pooled_projection_dim": 8,
        "rope_axes_dim": [4, 4, 4],
    },
    "LTXVideoTransformer3DModel": {
        "num_attention_heads": _HEADS,
        "attention_head_dim": _HEAD_DIM,
        "num_layers": 2,
        "cross_attention_dim": _HEADS * _HEAD_DIM,
        "caption_channels": _TEXT_DIM,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": _HEADS,
        "attention_head_dim": 16,  # its sine tables split the width in 16
        "num_layers": 2,
        "text_embed_dim": _TEXT_DIM,
        "time_embed_dim": 16,
        "max_text_seq_length": _TEXT_TOKENS,
    },
}

_DEFAULT_CONFIG = {"_class_name": "WanTransformer3DModel"}

# The schedulers that the families are published with, where a model folder brings none.
_FLOW_EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
    "HunyuanVideoTransformer3DModel": _FLOW_EULER,
    "LTXVideoTransformer3DModel": _FLOW_EULER,
    "CogVideoXTransformer3DModel": {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": False,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
}


@dataclass(frozen=True)
class Twin:
    """A tiny network with everything that one guided sampling chain of it needs, all in one dtype on the CPU.

    ``call(x, t, conditioning)`` is one network call written out as the family's pipeline makes it, free of the rest of
    this package, so that it can serve as the reference.
    """

    net: nn.Module
    scheduler: Any
    latents: Tensor
    conditioning: dict[str, Any]
    negative_conditioning: dict[str, Any] | None
    prepare_input: Callable[[Tensor, Tensor, int], dict[str, Any]] | None
    call: Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


def read_config(model: str | Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Transformer config and scheduler config from a ``config.json``, a model folder or a pipeline folder.

    ``None`` gives a Wan text-to-video model's. Raises FileNotFoundError when there is no config at ``model``, and
    ValueError when it is not that of a supported family.
    """
    config: dict[str, Any] = dict(_DEFAULT_CONFIG)
    scheduler: dict[str, Any] | None = None
    if model is not None:
        path = Path(model).expanduser()
        candidates = [path, path / "config.json", path / "transformer" / "config.json"]
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None:
            tried = ", ".join(str(candidate) for candidate in candidates)
            raise FileNotFoundError(f"model: no config.json at {path}, which must be local (looked at {tried})")
        config = _read_json(found)
        beside = found.parent.parent / "scheduler" / "scheduler_config.json"
        if beside.is_file():
            scheduler = _read_json(beside)
    name = config.get("_class_name")
    if name not in _SIZES:
        raise ValueError(f"model: the config's _class_name is {name!r}; twins can be made of {', '.join(_SIZES)}")
    return config, scheduler if scheduler is not None else _SCHEDULERS[name]


def shrink(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with its sizes replaced: same class, patches, channels, norms and conditioning switches."""
    name = config["_class_name"]
    small = {key: value for key, value in config.items() if not key.startswith("_")} | _SIZES[name]
    if name == "WanTransformer3DModel":
        if small.get("added_kv_proj_dim") is not None:
            small["added_kv_proj_dim"] = _HEADS * _HEAD_DIM
        if small.get("image_dim") is not None:
            small["image_dim"] = _TEXT_DIM
        if small.get("pos_embed_seq_len") is not None:
            small["pos_embed_seq_len"] = 2 * _TEXT_TOKENS
    if name == "CogVideoXTransformer3DModel":
        patch, frames = small.get("patch_size", 2), _FRAMES * (small.get("patch_size_t") or 1)
        compression = small.get("temporal_compression_ratio", 4)
        small |= {"sample_height": _HEIGHT * patch, "sample_width": _WIDTH * patch}
        small["sample_frames"] = (frames - 1) * compression + 1
        if small.get("ofs_embed_dim") is not None:
            small["ofs_embed_dim"] = 16
    return small


def make_twin(
    config: Mapping[str, Any],
    scheduler_config: Mapping[str, Any],
    *,
    num_inference_steps: int = 4,
    batch: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Twin:
    """Build the twin of ``config`` (see :func:`read_config`) with random weights, latents and conditioning.

    The scheduler already has its timesteps. Raises ImportError without diffusers, ValueError for a config with parts
    that no twin knows.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("the gradient check needs diffusers: pip install 'prfl-fast[diffusers]'") from error

    name = config["_class_name"]
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = getattr(diffusers, name)(**shrink(config)).eval()
    # Module.to itself: diffusers' own would warn that some parts are meant to stay in float32.
    nn.Module.to(net, dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            # Zero-initialised parts (final projections, scales) would hide errors behind gradients of zero.
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    make = _MAKERS[name]
    latents, conditioning, extra_channels = make(net.config, batch, randn)
    negative = None
    if not getattr(net.config, "guidance_embeds", False):
        negative = {"encoder_hidden_states": randn(*conditioning["encoder_hidden_states"].shape)}

    channel_axis = {"LTXVideoTransformer3DModel": 2, "CogVideoXTransformer3DModel": 2}.get(name, 1)
    prepare = None
    if extra_channels:
        shape = list(latents.shape)
        shape[channel_axis] = extra_channels
        condition = randn(*shape)

        def prepare(x: Tensor, t: Tensor, step: int) -> dict[str, Any]:
            return {"hidden_states": torch.cat([x, condition], dim=channel_axis)}

    def call(x: Tensor, t: Tensor, arguments: dict[str, Any]) -> Tensor:
        shown = (x if prepare is None else prepare(x, t, 0)["hidden_states"]).to(dtype)
        timestep = t.expand(x.shape[0])
        if name == "HunyuanVideoTransformer3DModel":
            timestep = timestep.to(x.dtype)
        output: Tensor = net(hidden_states=shown, timestep=timestep, return_dict=False, **arguments)[0]
        if name in {"LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel"}:
            output = output.float()  # as their pipelines do, whatever the model's dtype
        return output

    scheduler = _make_scheduler(diffusers, scheduler_config, num_inference_steps, latents)
    return Twin(net, scheduler, latents, conditioning, negative, prepare, call)


def _make_scheduler(diffusers: Any, config: Mapping[str, Any], steps: int, latents: Tensor) -> Any:
    name = config.get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ValueError(f"model: the scheduler config's _class_name is {name!r}, which this diffusers does not have")
    scheduler = getattr(diffusers, name).from_config(dict(config))
    dynamic = getattr(scheduler.config, "use_dynamic_shifting", False)
    scheduler.set_timesteps(steps, **({"mu": 0.7} if dynamic else {}))
    return scheduler


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} holds a {type(content).__name__}, expected an object")
    return content


# One maker a family: latents in the pipeline's layout, conditioning, channels that are concatenated to the latents.
_Made = tuple[Tensor, dict[str, Any], int]
_Randn = Callable[..., Tensor]


def _text(batch: int, randn: _Randn) -> Tensor:
    return randn(batch, _TEXT_TOKENS, _TEXT_DIM)


def _wan(config: Any, batch: int, randn: _Randn) -> _Made:
    frames, height, width = (
        count * size for count, size in zip((_FRAMES, _HEIGHT, _WIDTH), config.patch_size, strict=True)
    )
    channels = config.out_channels or config.in_channels
    conditioning = {"encoder_hidden_states": _text(batch, randn)}
    if config.image_dim is not None:
        # With a positional table (first and last frame) two images stand one after the other in the batch.
        images = 2 * batch if config.pos_embed_seq_len is not None else batch
        conditioning["encoder_hidden_states_image"] = randn(images, _TEXT_TOKENS, _TEXT_DIM)
    return randn(batch, channels, frames, height, width), conditioning, config.in_channels - channels


def _hunyuan_video(config: Any, batch: int, randn: _Randn) -> _Made:
    channels = config.out_channels or config.in_channels
    mask = torch.ones(batch, _TEXT_TOKENS, dtype=torch.bool)
    mask[0, _TEXT_TOKENS - 2 :] = False
    conditioning = {
        "encoder_hidden_states": _text(batch, randn),
        "encoder_attention_mask": mask,
        "pooled_projections": randn(batch, config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        conditioning["guidance"] = 6000.0 + 0 * randn(batch)
    frames, height, width = _FRAMES * config.patch_size_t, _HEIGHT * config.patch_size, _WIDTH * config.patch_size
    return randn(batch, channels, frames, height, width), conditioning, config.in_channels - channels


def _ltx(config: Any, batch: int, randn: _Randn) -> _Made:
    conditioning: dict[str, Any] = {
        "encoder_hidden_states": _text(batch, randn),
        "encoder_attention_mask": torch.ones(batch, _TEXT_TOKENS, dtype=torch.int64),
        "num_frames": _FRAMES,
        "height": _HEIGHT,
        "width": _WIDTH,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }
    return randn(batch, _FRAMES * _HEIGHT * _WIDTH, config.in_channels), conditioning, 0


def _cogvideox(config: Any, batch: int, randn: _Randn) -> _Made:
    patch, channels = config.patch_size, config.out_channels or config.in_channels
    frames = _FRAMES * (config.patch_size_t or 1)
    conditioning: dict[str, Any] = {"encoder_hidden_states": _text(batch, randn)}
    if config.use_rotary_positional_embeddings:
        angles = randn(_FRAMES * _HEIGHT * _WIDTH, config.attention_head_dim // 2).repeat_interleave(2, dim=1)
        conditioning["image_rotary_emb"] = (angles.cos(), angles.sin())
    if config.ofs_embed_dim is not None:
        conditioning["ofs"] = 2.0 + 0 * randn(1)
    shape = (batch, frames, channels, _HEIGHT * patch, _WIDTH * patch)
    return randn(*shape), conditioning, config.in_channels - channels


_MAKERS: dict[str, Callable[[Any, int, _Randn], _Made]] = {
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "LTXVideoTransformer3DModel": _ltx,
    "CogVideoXTransformer3DModel": _cogvideox,
}
