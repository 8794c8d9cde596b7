"""What every network call is given beside latents and timestep, from ``pipeline_inputs``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import prfl_fast
from prfl_fast.training.data.buckets import Bucket
from prfl_fast.training.data.latents import family_of


def encode_prompt(pipe: Any, prompt: str, bucket: Bucket, fps: float, options: dict[str, Any]) -> dict[str, Any]:
    """The conditioning of :func:`prfl_fast.pipeline_inputs`, a batch of 1 on the CPU, without guidance.

    Tables that belong to the shape (CogVideoX's rotary ones) and numbers (LTX's sizes) are among it, and HunyuanVideo's
    embedded guidance at the pipeline's default.

    Args:
        options: further arguments of the pipeline, such as ``max_sequence_length``.
    """
    family = family_of(pipe)
    if family != "HunyuanVideoPipeline":  # whose guidance_scale is embedded and does not make a second call
        options = {"guidance_scale": 1.0, **options}
    if family == "LTXPipeline":
        options = {"frame_rate": fps, **options}
    inputs = prfl_fast.pipeline_inputs(
        pipe,
        prompt,
        height=bucket.height,
        width=bucket.width,
        num_frames=bucket.frames,
        generator=torch.Generator().manual_seed(0),  # its noise is not used; the global generator stays as it is
        **options,
    )
    return {name: _on_cpu(value) for name, value in inputs["conditioning"].items()}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return tuple(_on_cpu(part) for part in value) if isinstance(value, (tuple, list)) else value
