"""Calls of the families that have no ``pipeline_inputs`` are those of their own pipelines, bit for bit: casts, timestep
convention, what comes back. Each pipeline runs without text encoders and decoder; what it gives its transformer and its
scheduler is noted."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import familynets
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import diffusers

from prfl_fast.models import adapter_for

Made = tuple[Any, Any, dict[str, Any]]  # network, pipeline, its arguments


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)


def skyreels(family: familynets.Family) -> Made:
    net = familynets.build(
        "SkyReelsV2Transformer3DModel", **familynets.HEADS, num_layers=1, ffn_dim=32, text_dim=16, freq_dim=16,
        in_channels=4, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.SkyReelsV2Pipeline(None, None, net, None, familynets.scheduler("unipc"))
    return net, pipe, {"height": 32, "width": 48, "num_frames": 5}


def hunyuan15(family: familynets.Family) -> Made:
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=1.0)
    sizes = {"latent_channels": 4, "block_out_channels": (2, 2, 2, 2, 2), "layers_per_block": 1}
    vae = diffusers.AutoencoderKLHunyuanVideo15(**sizes)
    pipe = diffusers.HunyuanVideo15Pipeline(None, None, family.net, vae, flow(), None, None, guider)
    words = family.keywords
    return family.net, pipe, {
        "height": 48, "width": 80, "num_frames": 5, "prompt_embeds_mask": words["encoder_attention_mask"],
        "prompt_embeds_2": words["encoder_hidden_states_2"], "prompt_embeds_mask_2": words["encoder_attention_mask_2"],
    }  # fmt: skip


def mochi(family: familynets.Family) -> Made:
    pipe = diffusers.MochiPipeline(familynets.scheduler("inverted"), None, None, None, family.net)
    mask = family.keywords["encoder_attention_mask"]
    return family.net, pipe, {"height": 32, "width": 48, "num_frames": 7, "prompt_attention_mask": mask}


def allegro(family: familynets.Family) -> Made:
    pipe = diffusers.AllegroPipeline(None, None, None, family.net, familynets.scheduler("ancestral"))
    mask = family.keywords["encoder_attention_mask"]
    return family.net, pipe, {"height": 32, "width": 48, "num_frames": 8, "prompt_attention_mask": mask}


def hunyuan_vae() -> nn.Module:
    """Whose sizes a pipeline asks for; nothing is encoded or decoded."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(2, 2, 2, 2), layers_per_block=1, norm_num_groups=1
    )


def easyanimate(family: familynets.Family) -> Made:
    net = familynets.build(
        "EasyAnimateTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        patch_size=2, num_layers=1, mmdit_layers=1, time_embed_dim=16, text_embed_dim=16,
    )  # fmt: skip
    pipe = diffusers.EasyAnimatePipeline(hunyuan_vae(), None, None, net, flow())
    mask = torch.ones(2, 5)
    return net, pipe, {"height": 32, "width": 48, "num_frames": 5, "prompt_attention_mask": mask}


def kandinsky5(family: familynets.Family) -> Made:
    pipe = diffusers.Kandinsky5T2VPipeline(family.net, hunyuan_vae(), None, None, None, None, flow())
    lengths = torch.tensor([0, 5, 10], dtype=torch.int32)
    return family.net, pipe, {
        "height": 32, "width": 48, "num_frames": 5, "prompt_embeds_clip": family.keywords["pooled_projections"],
        "prompt_cu_seqlens": lengths,
    }  # fmt: skip


def sana_video(family: familynets.Family) -> Made:
    pipe = diffusers.SanaVideoPipeline(None, None, None, family.net, familynets.scheduler("unipc"))
    mask = family.keywords["encoder_attention_mask"]
    sizes = {"height": 32, "width": 64, "frames": 5, "use_resolution_binning": False}
    return family.net, pipe, {**sizes, "prompt_attention_mask": mask}


def sd3(family: familynets.Family) -> Made:
    pipe = diffusers.StableDiffusion3Pipeline(family.net, flow(), *[None] * 7)
    return family.net, pipe, {"height": 32, "width": 48, "pooled_prompt_embeds": family.keywords["pooled_projections"]}


def flux(family: familynets.Family) -> Made:
    pipe = diffusers.FluxPipeline(flow(), None, None, None, None, None, family.net)
    pooled = family.keywords["pooled_projections"]
    return family.net, pipe, {"height": 32, "width": 48, "guidance_scale": 3.5, "pooled_prompt_embeds": pooled}


def qwen_image(family: familynets.Family) -> Made:
    pipe = diffusers.QwenImagePipeline(flow(), None, None, None, family.net)
    mask = family.keywords["encoder_hidden_states_mask"]
    return family.net, pipe, {"height": 32, "width": 48, "prompt_embeds_mask": mask}


MADE: dict[str, Callable[[familynets.Family], Made]] = {
    make.__name__: make for make in (
        skyreels, hunyuan15, mochi, allegro, easyanimate, kandinsky5, sana_video, sd3, flux, qwen_image,
    )
}  # fmt: skip
UNGUIDED = {"skyreels", "mochi", "allegro", "easyanimate", "kandinsky5", "sana_video", "sd3"}
# Whose pipeline puts something beside the latents' channels.
JOINED = {"hunyuan15", "kandinsky5"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MADE)
def test_calls_are_the_pipelines_own(name: str, dtype: torch.dtype) -> None:
    family = familynets.FAMILIES[name]()
    net, pipe, arguments = MADE[name](family)
    kept = getattr(net, "_keep_in_fp32_modules", None) or []
    for key, parameter in net.named_parameters():
        if not any(part in key.split(".") for part in kept):
            parameter.data = parameter.data.to(dtype)
    pipe.set_progress_bar_config(disable=True)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    calls: list[dict[str, Any]] = []
    steps: list[tuple[Tensor, Tensor, Tensor]] = []
    order = list(inspect.signature(net.forward).parameters)

    def called(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = {**dict(zip(order, args, strict=False)), **kwargs}
        given["hidden_states"] = given["hidden_states"].clone()  # Kandinsky's pipeline goes on writing into it
        calls.append(given)

    own = pipe.scheduler.step

    def step(prediction: Tensor, t: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps.append((prediction.clone(), t.clone(), sample.clone()))
        return own(prediction, t, sample, *args, **kwargs)

    pipe.scheduler.step = step
    latents = family.latents if name != "skyreels" else torch.randn(2, 4, 2, 4, 6)
    if name == "kandinsky5":  # it takes latents with these channels
        latents = torch.cat([latents, torch.zeros(2, 2, 4, 6, 5)], dim=-1)
    words = "prompt_embeds_qwen" if name == "kandinsky5" else "prompt_embeds"
    handle = net.register_forward_pre_hook(called, with_kwargs=True)
    pipe(
        num_inference_steps=6, output_type="latent", latents=cast(latents),
        **{words: cast(family.keywords["encoder_hidden_states"])},
        **{key: cast(value) for key, value in arguments.items()},
        **({"guidance_scale": 1.0} if name in UNGUIDED else {}),
    )  # fmt: skip
    handle.remove()

    adapter = adapter_for(net)
    assert len(calls) == len(steps) == 6
    done: list[Tensor] = []
    for call, (prediction, t, sample) in zip(calls, steps, strict=True):
        shown, _ = call.pop("hidden_states"), call.pop("timestep")
        call.pop("return_dict", None)
        prepared = name in JOINED
        scaled = pipe.scheduler.sigmas[len(done)] if name == "allegro" else None
        x = sample if scaled is None else sample / (scaled**2 + 1) ** 0.5
        done.append(x)
        assert shown.dtype == dtype and (prepared or torch.equal(shown, x.to(dtype)))
        adapter.validate(sample, call, prepared=prepared)
        with torch.no_grad():
            mine = adapter(x, t, call, {"hidden_states": shown} if prepared else None)
        # A scheduler step in float32 hides in which dtype the pipeline cast the prediction.
        assert mine.dtype == prediction.dtype
        assert torch.equal(mine, prediction)
    by = 1000 if name in ("flux", "qwen_image") else 1  # divided after the cast, which is not the same as before
    rounded = [float((t / by).to(dtype if by > 1 else t.dtype)) != float(t.to(dtype) / by) for _, t, _ in steps]
    assert dtype == torch.float32 or any(rounded), "no timestep whose cast would show"
