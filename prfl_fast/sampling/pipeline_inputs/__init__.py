"""``pipeline_inputs``: the arguments of ``unrolled_sample`` from a diffusers pipeline, one file a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prfl_fast.sampling.pipeline_inputs import cogvideox, hunyuan_video, ltx, wan, wan_vace
from prfl_fast.sampling.pipeline_inputs.arguments import Arguments, complete, private_view
from prfl_fast.sampling.pipeline_inputs.decoding import check_decode, pixel_decoder
from prfl_fast.solvers.refused import refuse_unsupported


@dataclass(frozen=True)
class _Family:
    arguments: tuple[str, ...]
    build: Callable[[Any, Arguments], Arguments]
    defaults: Callable[[Any], Arguments] = lambda pipe: {}  # where the pipeline's signature does not tell them
    instead_of_image: str | None = None  # the argument that makes the first frame unnecessary


_FAMILIES: dict[str, _Family] = {
    "WanPipeline": _Family(wan.TEXT_ARGUMENTS, wan.text_to_video),
    "WanImageToVideoPipeline": _Family(wan.IMAGE_ARGUMENTS, wan.image_to_video),
    "WanVACEPipeline": _Family(wan_vace.ARGUMENTS, wan_vace.edited_video),
    "HunyuanVideoPipeline": _Family(hunyuan_video.ARGUMENTS, hunyuan_video.text_to_video),
    "LTXPipeline": _Family(ltx.ARGUMENTS, ltx.text_to_video),
    "LTXImageToVideoPipeline": _Family(ltx.IMAGE_ARGUMENTS, ltx.image_to_video, instead_of_image="latents"),
    "CogVideoXPipeline": _Family(cogvideox.ARGUMENTS, cogvideox.text_to_video, cogvideox.default_sizes),
}


def pipeline_inputs(
    pipe: Any,
    prompt: str | list[str] | None = None,
    *,
    negative_prompt: str | list[str] | None = None,
    image: Any = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    generator: Any = None,
    latents: Any = None,
    decode: bool = False,
    **extras: Any,
) -> dict[str, Any]:
    """Builds the call of ``unrolled_sample`` that samples what ``pipe(...)`` would sample.

    ``unrolled_sample(**pipeline_inputs(pipe, ...), solver="scheduler")`` gives the latents of
    ``pipe(..., output_type="latent")``: bit for bit where the pipeline calls the guidance branches apart (Wan,
    HunyuanVideo), within the dtype's rounding where it batches them (LTX, CogVideoX).

    Prompts are encoded by the pipeline's own text encoders, noise is drawn by its own ``prepare_latents``, both without
    a graph; embeddings and latents that are given keep theirs. The pipeline is not changed: the scheduler in the result
    is a copy that has its timesteps.

    Args:
        pipe: a WanPipeline (2.1; 2.2 with two experts; 5B), WanImageToVideoPipeline, WanVACEPipeline,
            HunyuanVideoPipeline, LTXPipeline, LTXImageToVideoPipeline or CogVideoXPipeline, or a subclass that keeps
            their call.
        prompt, negative_prompt, image, height, width, num_frames, num_inference_steps, guidance_scale, generator,
            latents: as for ``pipe(...)``; None is the pipeline's own default.
        decode: also give ``decode``, the pipeline's VAE with what this family's latents need (the sizes that packed
            latents stand for; frames that the pipeline drops before it decodes), so that ``sample.frames`` is what the
            pipeline would show. Freeze the VAE unless it shall learn.
        extras: further arguments of the pipeline's call that shape the latents: ``prompt_embeds``,
            ``guidance_scale_2`` and ``last_image`` (Wan), ``video``, ``mask``, ``reference_images`` and
            ``conditioning_scale`` (VACE), ``true_cfg_scale`` and ``prompt_template`` (HunyuanVideo), ``frame_rate``
            and ``guidance_rescale`` (LTX), ``use_dynamic_cfg`` (CogVideoX), and so on.

    Returns:
        Keyword arguments of ``unrolled_sample``. ``generator`` is not among them: give it to ``unrolled_sample`` for a
        scheduler that draws noise, or for a random gradient mode.

    Raises:
        TypeError: a pipeline of another class, or an argument that it does not take; the message lists what there is.
        ValueError: an argument that is missing or does not fit, before anything is encoded.

    Example:
        >>> inputs = pipeline_inputs(pipe, prompt="a heron takes off", height=480, width=832, num_frames=81)
        >>> sample = unrolled_sample(**inputs, gradient="prfl")
    """
    family = _family(pipe)
    given: Arguments = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "image": image,
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "generator": generator,
        "latents": latents,
        **extras,
    }
    if getattr(pipe, "transformer", None) is None:
        raise ValueError(f"pipe: this {type(pipe).__name__} holds no transformer")
    refuse_unsupported(pipe.scheduler)
    if decode:
        check_decode(pipe)
    arguments = complete(pipe, given, family.arguments, family.defaults(pipe), family.instead_of_image)
    inputs = family.build(private_view(pipe), arguments)
    return inputs | {"decode": pixel_decoder(pipe, arguments, inputs)} if decode else inputs


def _family(pipe: Any) -> _Family:
    # By the class whose call it is: a subclass that samples otherwise is another pipeline.
    for cls in type(pipe).__mro__:
        if "__call__" in vars(cls):
            if cls.__name__ in _FAMILIES:
                return _FAMILIES[cls.__name__]
            break
    raise TypeError(f"pipe: expected one of {', '.join(_FAMILIES)}, got {type(pipe).__name__}")
