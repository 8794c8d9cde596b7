"""``decode=``: frames of the chain with a gradient, both graph forms, whole pipelines, one-line pixel rewards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tinypipes
import tinyvaes
import torch
from torch import Tensor, nn

import prfl_fast

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
STEPS = 3


class Net(nn.Module):
    """net(x, t) over [B, 4, F, 2, 3], float64 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(5, 6, (1, 3, 3), padding=(0, 1, 1))
        self.last = nn.Conv3d(6, 4, 1)
        self.double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t.double() / 1000).reshape(-1, 1, 1, 1, 1).expand(len(x), 1, *x.shape[2:])
        return self.last(torch.tanh(self.first(torch.cat([x, time], 1))))


def scheduler() -> Any:
    import diffusers

    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def reward(frames: Tensor) -> Tensor:
    return (frames.flatten(1) * torch.linspace(-1, 1, frames[0].numel(), dtype=frames.dtype)).sum(1) ** 2


def plain(net: Net, vae: Any, latents: Tensor, stop: int = STEPS, predicted: bool = False) -> Tensor:
    """Frames after ``stop`` steps by diffusers' own loop, or of what the last of them predicts."""
    own = scheduler()
    own.set_timesteps(STEPS)
    x = original = latents
    for step in range(stop):
        velocity = net(x, own.timesteps[step])
        original = x - own.sigmas[step].double() * velocity
        x = own.step(velocity, own.timesteps[step], x, return_dict=False)[0]
    return tinyvaes.plain("wan", vae, original if predicted else x)


class Case:
    def __init__(self) -> None:
        self.net, self.vae = Net(), tinyvaes.wan().requires_grad_(False)
        self.latents = tinyvaes.latents("wan", 2, 3).requires_grad_()

    def sample(self, **arguments: Any) -> prfl_fast.Sample:
        given = {"decode": self.vae, **arguments}
        return prfl_fast.unrolled_sample(self.net, scheduler(), self.latents, STEPS, **given)

    def gradients(self) -> Tensor:
        leaves = [self.latents, *self.net.parameters()]
        found = torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None])
        for leaf in leaves:
            leaf.grad = None
        return found

    def expected(self, *losses: Tensor) -> Tensor:
        torch.stack(losses).sum().backward()
        return self.gradients()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # UniPC's float32 coefficients are the same numbers on both sides; what differs is the order of float64 additions.
    assert expected.norm() > 0 and (actual - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_the_gradient_of_a_reward_on_frames(graph: str) -> None:
    case = Case()
    expected = case.expected(reward(plain(case.net, case.vae, case.latents)).sum())
    sample = case.sample(graph=graph)
    frames = sample.frames
    assert frames.shape == (2, 3, 5, 4, 6) and frames.min() >= 0 and frames.max() <= 1
    reward(frames).sum().backward()
    if graph == "steps":
        sample.backward()
    assert_close(case.gradients(), expected)
    assert all(p.grad is None for p in case.vae.parameters())


def test_a_loss_function_is_given_the_frames_of_each_tap() -> None:
    case = Case()
    expected = case.expected(*(reward(plain(case.net, case.vae, case.latents, n)).sum() for n in (2, 3)))
    sample = case.sample(graph="steps", supervise=(2, 3))
    seen: list[tuple[tuple[int, ...], int]] = []

    def loss(frames: Tensor, timestep: Tensor, step: int) -> Tensor:
        seen.append((tuple(frames.shape), step))
        return reward(frames).sum()

    total = sample.backward(loss)
    assert total is not None and seen == [((2, 3, 5, 4, 6), 3), ((2, 3, 5, 4, 6), 2)]
    assert_close(case.gradients(), expected)


def test_rgb_refl_is_a_reward_on_the_predicted_clean_video() -> None:
    """ReFL (arXiv 2304.05977) on the first frame: one step, its prediction decoded."""
    case = Case()
    first = prfl_fast.PixelDecoder(case.vae, latent_frames=slice(1))
    own = scheduler()
    own.set_timesteps(STEPS)
    with torch.no_grad():
        x = case.latents
        for t in own.timesteps[:1]:
            x = own.step(case.net(x, t), t, x, return_dict=False)[0]
    t, sigma = own.timesteps[1], own.sigmas[1].double()
    predicted = tinyvaes.plain("wan", case.vae, (x - sigma * case.net(x, t))[:, :, :1])
    expected = torch.autograd.grad(reward(predicted).sum(), list(case.net.parameters()))
    sample = case.sample(decode=first, gradient="step:1", stop_step=2)
    frames = sample.decode(sample.pred_original_sample)
    assert frames.shape == (2, 3, 1, 4, 6)
    actual = torch.autograd.grad(reward(frames).sum(), list(case.net.parameters()))
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs)


def test_a_function_of_the_latents_decodes_too() -> None:
    case = Case()
    sample = case.sample(decode=lambda latents: latents[:, :3].sigmoid(), gradient="last:1")
    assert torch.equal(sample.frames, sample.latents[:, :3].sigmoid())


def test_the_gradient_modes_are_compared_on_frames() -> None:
    case = Case()
    seen: list[tuple[int, ...]] = []

    def rewarded(frames: Tensor, timestep: Tensor) -> Tensor:
        seen.append(tuple(frames.shape))
        return reward(frames)

    rows = prfl_fast.compare_gradients(
        case.net, scheduler(), case.latents, STEPS, reward=rewarded, modes=["last:1"], decode=case.vae
    ).rows
    assert set(seen) == {(2, 3, 5, 4, 6)} and rows[0].cosine == pytest.approx(1) and 0 < rows[1].cosine < 1


def test_a_decoder_that_changed_is_refused() -> None:
    case = Case()
    frames = case.sample().frames
    with torch.no_grad():
        case.vae.decoder.conv_out.weight.mul_(2)
    with pytest.raises(prfl_fast.ModelChangedError, match="tensor 'decoder.conv_out.weight' was written to"):
        frames.sum().backward()
    assert all(p.grad is None for p in case.net.parameters())


def test_what_is_missing_or_wrong_is_said_before_any_call() -> None:
    case = Case()
    calls: list[int] = []
    case.net.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(TypeError, match="decode: expected a VAE"):
        case.sample(decode=3)
    with pytest.raises(ValueError, match="with 16 channels for AutoencoderKLWan"):
        case.sample(decode=tinyvaes.wan(z_dim=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16))
    assert not calls
    with pytest.raises(RuntimeError, match=r"call unrolled_sample\(\.\.\., decode=pipe\.vae\)"):
        _ = case.sample(decode=None).frames


# Whole pipelines.

PROMPTS = {"prompt": [tinypipes.PROMPT, "a cat jumps over the lake"], "negative_prompt": [tinypipes.NEGATIVE, ""]}


def pipelines() -> dict[str, tuple[Any, str, dict[str, Any]]]:
    """Name -> maker of a pipeline, its sizes, further arguments."""
    return {
        "wan": (tinypipes.wan, "wan", {}),
        "hunyuan": (tinypipes.hunyuan, "hunyuan", {}),
        "ltx": (tinypipes.ltx, "ltx", {}),
        "cogvideox": (tinypipes.cogvideox, "cogvideox", {}),
        "cogvideox 1.5": (lambda dtype: tinypipes.cogvideox(dtype, version="1.5"), "cogvideox", {"num_frames": 9}),
    }


@pytest.mark.parametrize("name", ["wan", "hunyuan", "ltx", "cogvideox", "cogvideox 1.5"])
def test_frames_are_those_that_the_pipeline_shows(name: str) -> None:
    make, sizes, extra = pipelines()[name]
    pipe = make(torch.float32)
    pipe.vae.requires_grad_(False)

    def arguments() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {**tinypipes.SIZES[sizes], **PROMPTS, "num_inference_steps": 2, "generator": generator, **extra}

    shown = pipe(**arguments(), output_type="pt").frames.transpose(1, 2)
    before = copy.deepcopy(dict(vars(pipe.vae)["_internal_dict"]))
    inputs = prfl_fast.pipeline_inputs(pipe, **arguments(), decode=True)
    sample = prfl_fast.unrolled_sample(**inputs, solver="scheduler", gradient="last:1")
    frames = sample.frames
    assert frames.shape == shown.shape and shown.std() > 1e-3
    if sizes in ("wan", "hunyuan"):
        assert torch.equal(frames, shown)
    else:
        # Their latents differ in the last bits, for the pipelines batch the guidance branches.
        # 512 roundings of numbers of order 1: two steps and a decoder of some thirty layers.
        torch.testing.assert_close(frames, shown, rtol=0, atol=512 * torch.finfo(torch.float32).eps)
    # RGB ReFL in one line.
    (-reward(frames)).mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in pipe.transformer.parameters())
    assert before == dict(vars(pipe.vae)["_internal_dict"])


def test_a_reference_image_is_not_a_frame() -> None:
    from PIL import Image

    pipe = tinypipes.wan_vace(torch.float32)
    picture = Image.new("RGB", (48, 32), (200, 60, 20))
    inputs = {
        **tinypipes.SIZES["wan"], "prompt": tinypipes.PROMPT, "negative_prompt": tinypipes.NEGATIVE,
        "reference_images": [picture], "num_inference_steps": 2,
    }  # fmt: skip
    shown = pipe(**inputs, generator=torch.Generator().manual_seed(0), output_type="pt").frames.transpose(1, 2)
    made = prfl_fast.pipeline_inputs(pipe, **inputs, generator=torch.Generator().manual_seed(0), decode=True)
    sample = prfl_fast.unrolled_sample(**made, solver="scheduler", gradient="none")
    assert sample.latents.shape[2] == 3 and torch.equal(sample.frames, shown)


def test_a_pipeline_that_can_not_decode() -> None:
    pipe = tinypipes.wan(torch.float32)
    arguments = {**tinypipes.SIZES["wan"], "prompt": tinypipes.PROMPT}
    assert "decode" not in prfl_fast.pipeline_inputs(pipe, **arguments)
    pipe.vae = None
    with pytest.raises(ValueError, match="decode: this WanPipeline holds no vae"):
        prfl_fast.pipeline_inputs(pipe, **arguments, decode=True)
    pipe.vae = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="vae: expected one of"):
        prfl_fast.pipeline_inputs(pipe, **arguments, decode=True)
