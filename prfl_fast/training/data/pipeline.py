"""The parts of a checkpoint that encoding needs: VAE, text encoders, tokenizers; of the transformer its config only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prfl_fast.training.data.latents import FAMILIES, family_of

# Frames a second that the models were trained at, as their pipelines' examples export them.
_FPS = {"WanPipeline": 16.0, "HunyuanVideoPipeline": 24.0, "LTXPipeline": 25.0, "CogVideoXPipeline": 8.0}


def load_pipeline(model: str, dtype: torch.dtype, vae_dtype: torch.dtype, device: str) -> Any:
    """A pipeline whose transformers are stand-ins with config and dtype: gigabytes that encoding does not read.

    Args:
        model: a folder in diffusers' layout, or an id of the hub.
        dtype: of the text encoders.
        vae_dtype: of the VAE and so of the latents.

    Raises:
        ImportError: diffusers, transformers or accelerate is missing.
        OSError, ValueError, TypeError: nothing to load, or another pipeline.
    """
    try:
        import diffusers
        from accelerate import init_empty_weights
    except ImportError as error:
        raise ImportError("model: loading it needs diffusers: pip install 'prfl-fast[diffusers]'") from error

    if Path(model).expanduser().exists():
        model = str(Path(model).expanduser())
    parts = diffusers.DiffusionPipeline.load_config(model)
    name = parts.get("_class_name")
    if name not in FAMILIES:
        raise ValueError(f"model: {model}: expected a pipeline of {', '.join(FAMILIES)}, got {name}")
    networks = {key: value for key, value in parts.items() if key.startswith("transformer") and value[0] is not None}
    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    keyword = "dtype" if (major, minor) >= (0, 42) else "torch_dtype"  # renamed; the old one warns from then on
    dtypes = {keyword: {"vae": vae_dtype, "default": dtype}}
    pipe = getattr(diffusers, name).from_pretrained(model, **dtypes, **dict.fromkeys(networks))
    for key, (_, kind) in networks.items():
        cls = getattr(diffusers, kind)
        with init_empty_weights():
            empty = cls.from_config(cls.load_config(model, subfolder=key))
        setattr(pipe, key, SimpleNamespace(config=empty.config, dtype=dtype))
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            part.to(device).eval().requires_grad_(False)
    return pipe


def default_fps(pipe: Any) -> float:
    """Frames a second of the family's clips; 16 for CogVideoX 1.5."""
    family = family_of(pipe)
    if family == "CogVideoXPipeline" and pipe.transformer.config.patch_size_t:
        return 16.0
    return _FPS[family]
