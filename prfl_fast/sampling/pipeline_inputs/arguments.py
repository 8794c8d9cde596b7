"""What every family's builder starts from: the pipeline's arguments, checked and complete, and a private view of it."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prfl_fast.solvers.private import copy_scheduler

Arguments = dict[str, Any]

# What all text-to-video pipelines take.
COMMON = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "attention_kwargs",
    "max_sequence_length",
)


def private_view(pipe: Any) -> Any:
    """A shallow copy of the pipeline with a scheduler of its own: whatever is set on it, ``pipe`` stays as it is."""
    view = copy.copy(pipe)
    view.scheduler = copy_scheduler(pipe.scheduler)
    return view


def complete(
    pipe: Any, given: Arguments, names: Sequence[str], defaults: Arguments, instead_of_image: str | None = None
) -> Arguments:
    """The arguments of the pipeline's own call: those given, ``defaults``, and those of its signature for the others.

    A pipeline that takes an image needs it, unless ``instead_of_image`` is given.

    Raises:
        TypeError: an argument that is not among ``names``.
        ValueError: one that is missing, or that the pipeline's ``check_inputs`` refuses.
    """
    kind = type(pipe).__name__
    parameters = inspect.signature(type(pipe).__call__).parameters
    known = [name for name in names if name in parameters]
    given = {name: value for name, value in given.items() if value is not None}
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: unknown for {kind}; expected some of {', '.join(known)}")
    own = {name: parameters[name].default for name in known}
    arguments = {name: None if value is inspect.Parameter.empty else value for name, value in own.items()}
    arguments |= defaults | given
    _check(pipe, kind, arguments, instead_of_image)
    checked = inspect.signature(pipe.check_inputs).parameters
    pipe.check_inputs(**{name: arguments.get(name) for name in checked})
    return arguments


def _check(pipe: Any, kind: str, arguments: Arguments, instead_of_image: str | None) -> None:
    prompt = arguments["prompt"]
    if prompt is None and arguments["prompt_embeds"] is None:
        raise ValueError("prompt: expected a string, a list of strings, or prompt_embeds instead; got neither")
    if prompt is not None and pipe.text_encoder is None:
        raise ValueError(f"prompt: this {kind} holds no text_encoder; expected prompt_embeds instead")
    if isinstance(prompt, list) and not prompt:
        raise ValueError("prompt: expected at least one string, got an empty list")
    replaced = instead_of_image is not None and arguments[instead_of_image] is not None
    if "image" in arguments and arguments["image"] is None and not replaced:
        raise ValueError(f"image: {kind} needs the first frame, an image or a tensor; got None")
    steps, scale = arguments["num_inference_steps"], arguments["guidance_scale"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps: expected a whole number from 1, got {steps!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"guidance_scale: expected a finite number, got {scale!r}")


def batch_size(arguments: Arguments) -> int:
    """Number of prompts."""
    prompt = arguments["prompt"]
    if prompt is None:
        return int(arguments["prompt_embeds"].shape[0])
    return 1 if isinstance(prompt, str) else len(prompt)


def num_samples(arguments: Arguments) -> int:
    """Number of videos: B in every shape."""
    return batch_size(arguments) * (arguments.get("num_videos_per_prompt") or 1)


def set_timesteps(pipe: Any, num_inference_steps: int | None = None, **options: Any) -> None:
    """``set_timesteps`` on the view's scheduler; ValueError where it does not take what the pipeline passes."""
    scheduler = pipe.scheduler
    missing = [name for name in options if name not in inspect.signature(scheduler.set_timesteps).parameters]
    if missing:
        raise ValueError(
            f"pipe.scheduler: {type(pipe).__name__} needs one whose set_timesteps takes {', '.join(missing)}; "
            f"{type(scheduler).__name__} does not"
        )
    given = () if num_inference_steps is None else (num_inference_steps,)
    scheduler.set_timesteps(*given, device=pipe._execution_device, **options)


def encode(pipe: Any, arguments: Arguments, names: Sequence[str], **options: Any) -> Any:
    """``encode_prompt`` without a graph, with those of the arguments that are named.

    Embeddings that the caller gave come back as they are, with whatever graph they have.
    """
    with torch.no_grad():
        return pipe.encode_prompt(
            **{name: arguments[name] for name in names if name in arguments},
            device=pipe._execution_device,
            **options,
        )


def initial_latents(pipe: Any, arguments: Arguments, channels: int, **options: Any) -> Tensor:
    """``prepare_latents`` with the caller's generator; latents that the caller gave keep their graph."""
    with torch.no_grad():
        prepared: Tensor = pipe.prepare_latents(
            **{
                "batch_size": num_samples(arguments),
                "num_channels_latents": channels,
                "height": arguments["height"],
                "width": arguments["width"],
                "num_frames": arguments["num_frames"],
                "dtype": torch.float32,
                "device": pipe._execution_device,
                "generator": arguments["generator"],
                "latents": arguments["latents"],
                **options,
            }
        )
    return prepared if arguments["latents"] is None else arguments["latents"].to(prepared)


def assemble(
    pipe: Any,
    arguments: Arguments,
    latents: Tensor,
    conditioning: Arguments,
    negative: Arguments | None,
    guidance_scale: Any,
) -> Arguments:
    """The part of ``unrolled_sample``'s arguments that every family has."""
    if arguments["attention_kwargs"] is not None:
        conditioning = {**conditioning, "attention_kwargs": arguments["attention_kwargs"]}
    inputs = {
        "transformer": pipe.transformer,
        "scheduler": pipe.scheduler,
        "latents": latents,
        "num_inference_steps": None,
        "conditioning": conditioning,
    }
    if negative is not None:
        inputs |= {"negative_conditioning": negative, "guidance_scale": guidance_scale}
    return inputs
