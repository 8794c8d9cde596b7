"""An adapter's call gives the prediction that the family's own pipeline hands to its scheduler, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

import diffusers
from tinyfamilies import make

from prfl_fast.models import adapter_for

DTYPES = [torch.float32, torch.bfloat16]
SIZE = {"height": 32, "width": 48, "num_frames": 5}  # latents [2, C, 2, 4, 6] under the pipelines' default compression


class Recorder:
    """Notes what a pipeline hands to ``scheduler.step``: prediction, timestep, latents."""

    def __init__(self, scheduler: Any) -> None:
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        step = scheduler.step

        def noted(prediction: Tensor, t: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.steps.append((prediction.clone(), t.clone(), sample.clone()))
            return step(prediction, t, sample, *args, **kwargs)

        scheduler.step = noted


def run(pipe: Any, **arguments: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    pipe.set_progress_bar_config(disable=True)
    recorder = Recorder(pipe.scheduler)
    pipe(num_inference_steps=3, output_type="latent", **arguments)
    assert len(recorder.steps) == 3
    return recorder.steps


def check(steps: list[tuple[Tensor, Tensor, Tensor]], predict: Any) -> None:
    for prediction, t, latents in steps:
        with torch.no_grad():
            mine = predict(latents, t)
        assert mine.dtype == prediction.dtype
        assert torch.equal(mine, prediction)


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wan_with_two_experts_and_guidance(dtype: torch.dtype) -> None:
    high, low = make("wan", dtype), make("wan", dtype, seed=1)
    text, negative = high.conditioning["encoder_hidden_states"], low.conditioning["encoder_hidden_states"]
    pipe = diffusers.WanPipeline(None, None, None, unipc(), high.net, low.net, boundary_ratio=0.8)
    steps = run(
        pipe, latents=high.latents, prompt_embeds=text, negative_prompt_embeds=negative, guidance_scale=3.0,
        guidance_scale_2=2.0, **SIZE,
    )  # fmt: skip
    sides = {float(t) >= 800 for _, t, _ in steps}
    assert sides == {True, False}

    def predict(x: Tensor, t: Tensor) -> Tensor:
        adapter, scale = (adapter_for(high.net), 3.0) if t >= 800 else (adapter_for(low.net), 2.0)
        c = adapter(x, t, {"encoder_hidden_states": text}, None)
        u = adapter(x, t, {"encoder_hidden_states": negative}, None)
        return u + scale * (c - u)

    check(steps, predict)


@pytest.mark.parametrize("dtype", DTYPES)
def test_wan_with_a_timestep_per_token(dtype: torch.dtype) -> None:
    twin = make("wan", dtype)
    pipe = diffusers.WanPipeline(None, None, None, unipc(), twin.net, expand_timesteps=True)
    text = twin.conditioning["encoder_hidden_states"]
    steps = run(pipe, latents=twin.latents, prompt_embeds=text, guidance_scale=1.0, **SIZE)
    adapter = adapter_for(twin.net)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        tokens = (torch.ones(x.shape[2], x.shape[3] // 2, x.shape[4] // 2) * t).flatten()
        timestep = tokens.unsqueeze(0).expand(x.shape[0], -1)
        return adapter(x, t, {"encoder_hidden_states": text}, {"timestep": timestep})

    check(steps, predict)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hunyuan_video_with_true_guidance(dtype: torch.dtype) -> None:
    twin, other = make("hunyuan-distilled", dtype), make("hunyuan-distilled", dtype, seed=1)
    pipe = diffusers.HunyuanVideoPipeline(
        None, None, twin.net, None, diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), None, None
    )
    mine, negative = twin.conditioning, other.conditioning
    steps = run(
        pipe, latents=twin.latents, guidance_scale=6.0, true_cfg_scale=2.5,
        prompt_embeds=mine["encoder_hidden_states"], negative_prompt_embeds=negative["encoder_hidden_states"],
        prompt_attention_mask=mine["encoder_attention_mask"],
        negative_prompt_attention_mask=negative["encoder_attention_mask"],
        pooled_prompt_embeds=mine["pooled_projections"], negative_pooled_prompt_embeds=negative["pooled_projections"],
        **SIZE,
    )  # fmt: skip
    adapter = adapter_for(twin.net)
    guidance = torch.tensor([6.0] * 2, dtype=dtype) * 1000.0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        c = adapter(x, t, {**mine, "guidance": guidance}, None)
        u = adapter(x, t, {**negative, "guidance": guidance}, None)
        return u + 2.5 * (c - u)

    # In bfloat16 the timestep's dtype shows: 966.67 in float32 would be 968 in the network's.
    assert any(t != t.to(torch.bfloat16) for _, t, _ in steps)
    check(steps, predict)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ltx(dtype: torch.dtype) -> None:
    twin = make("ltx", dtype)
    # The pipeline casts to the prompt's dtype, which is the network's where the two belong together.
    conditioning = {**twin.conditioning, "encoder_hidden_states": twin.conditioning["encoder_hidden_states"].to(dtype)}
    pipe = diffusers.LTXPipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, twin.net)
    steps = run(
        pipe, latents=twin.latents, guidance_scale=1.0, frame_rate=25, height=64, width=96, num_frames=9,
        prompt_embeds=conditioning["encoder_hidden_states"],
        prompt_attention_mask=conditioning["encoder_attention_mask"],
    )  # fmt: skip
    adapter = adapter_for(twin.net)
    check(steps, lambda x, t: adapter(x, t, conditioning, None))
    assert all(prediction.dtype == torch.float32 for prediction, _, _ in steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cogvideox", "cogvideox-rotary"])
def test_cogvideox(name: str, dtype: torch.dtype) -> None:
    twin = make(name, dtype)
    conditioning = {"encoder_hidden_states": twin.conditioning["encoder_hidden_states"].to(dtype)}
    pipe = diffusers.CogVideoXPipeline(None, None, None, twin.net, diffusers.CogVideoXDDIMScheduler())
    size = {"height": 32, "width": 48, "num_frames": 5}
    if name == "cogvideox-rotary":
        frames = twin.latents.shape[1]
        conditioning["image_rotary_emb"] = pipe._prepare_rotary_positional_embeddings(32, 48, frames, "cpu")
    steps = run(
        pipe, latents=twin.latents.to(dtype), guidance_scale=1.0,
        prompt_embeds=conditioning["encoder_hidden_states"], **size,
    )  # fmt: skip
    adapter = adapter_for(twin.net)
    check(steps, lambda x, t: adapter(x, t, conditioning, None))
    assert all(prediction.dtype == torch.float32 for prediction, _, _ in steps)
