"""Whole tiny pipelines against the chain that ``pipeline_inputs`` makes of them: latents, gradients, what stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tinypipes
import torch
from torch import Tensor, nn

import prfl_fast

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 5
PROMPTS = {"prompt": [tinypipes.PROMPT, "a cat jumps over the lake"], "negative_prompt": [tinypipes.NEGATIVE, ""]}
DTYPES = [torch.float32, torch.bfloat16]


def call(family: str, seed: int = 0, **arguments: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call; the generator is a new one each time."""
    generator = torch.Generator().manual_seed(seed)
    common = {**tinypipes.SIZES[family], **PROMPTS, "num_inference_steps": STEPS, "generator": generator}
    return {**common, **arguments}


def of_pipeline(pipe: Any, family: str, **arguments: Any) -> Tensor:
    return pipe(**call(family, **arguments), output_type="latent").frames


def of_chain(pipe: Any, family: str, solver: str = "scheduler", **arguments: Any) -> Tensor:
    inputs = prfl_fast.pipeline_inputs(pipe, **call(family, **arguments))
    return prfl_fast.unrolled_sample(**inputs, gradient="none", solver=solver).latents


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.isfinite(expected).all() and expected.std() > 0.1
    assert torch.equal(actual, expected)


def picture() -> Any:
    from PIL import Image

    return Image.fromarray((torch.rand(32, 48, 3) * 255).to(torch.uint8).numpy())


# Bit for bit, where the pipeline calls the guidance branches apart.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_wan_bit_for_bit(dtype: torch.dtype, solver: str, experts: int, scale: float) -> None:
    pipe = tinypipes.wan(dtype, solver, experts=experts)
    arguments = {"guidance_scale": scale, **({"guidance_scale_2": 3.0} if experts == 2 else {})}
    expected = of_pipeline(pipe, "wan", **arguments)
    assert_same_bits(of_chain(pipe, "wan", **arguments), expected)
    if experts == 2:
        boundary = 0.85 * 1000
        timesteps = prfl_fast.pipeline_inputs(pipe, **call("wan", **arguments))["scheduler"].timesteps
        assert (timesteps >= boundary).any() and (timesteps < boundary).any(), "both experts must run"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_wan_with_a_timestep_per_token(dtype: torch.dtype, solver: str) -> None:
    pipe = tinypipes.wan(dtype, solver, expand_timesteps=True)
    assert_same_bits(of_chain(pipe, "wan"), of_pipeline(pipe, "wan"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("kind", ["clip", "first_last", "experts", "expand"])
def test_wan_from_an_image(dtype: torch.dtype, solver: str, kind: str) -> None:
    pipe = tinypipes.wan_image(dtype, solver, kind=kind)
    images = {"image": picture()} | ({"last_image": picture()} if kind == "first_last" else {})
    expected = of_pipeline(pipe, "wan", **images)
    assert_same_bits(of_chain(pipe, "wan", **images), expected)
    other = of_chain(pipe, "wan", **images | {"image": picture()})
    assert not torch.equal(other, expected), "the image must matter"


# Its pipeline makes one video of one string.
ONE = {"prompt": tinypipes.PROMPT, "negative_prompt": tinypipes.NEGATIVE}


def edit() -> dict[str, Any]:
    """Five frames whose last three are made anew, and a reference image of another shape."""
    from PIL import Image

    masks = [Image.new("L", (48, 32), 255 * (frame > 1)) for frame in range(5)]
    return {"video": [picture() for _ in range(5)], "mask": masks, "reference_images": [picture().resize((16, 24))]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("experts", [1, 2])
def test_wan_vace_bit_for_bit(dtype: torch.dtype, solver: str, experts: int) -> None:
    pipe = tinypipes.wan_vace(dtype, solver, experts=experts)
    arguments = {**ONE, **edit(), "conditioning_scale": 0.7, "num_inference_steps": 4}
    expected = of_pipeline(pipe, "wan", **arguments)
    assert expected.shape == (1, 16, 3, 4, 6)  # the reference image's frame stands in front
    assert_same_bits(of_chain(pipe, "wan", **arguments), expected)
    for changed in (edit(), {"conditioning_scale": [0.2]}, {"mask": None}):
        assert not torch.equal(of_chain(pipe, "wan", **arguments | changed), expected), "the control must matter"


def test_wan_vace_from_text_alone() -> None:
    pipe = tinypipes.wan_vace(torch.float32)
    assert_same_bits(of_chain(pipe, "wan", **ONE), of_pipeline(pipe, "wan", **ONE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_hunyuan_bit_for_bit(dtype: torch.dtype, scale: float) -> None:
    pipe = tinypipes.hunyuan(dtype)
    arguments = {"true_cfg_scale": scale, "guidance_scale": 4.0}
    assert_same_bits(of_chain(pipe, "hunyuan", **arguments), of_pipeline(pipe, "hunyuan", **arguments))


def test_custom_sigmas_of_hunyuan() -> None:
    pipe = tinypipes.hunyuan(torch.float32)
    sigmas = [1.0, 0.7, 0.2]
    assert_same_bits(of_chain(pipe, "hunyuan", sigmas=sigmas), of_pipeline(pipe, "hunyuan", sigmas=sigmas))


@pytest.mark.parametrize("family", ["ltx", "cogvideox"])
def test_one_branch_bit_for_bit(family: str) -> None:
    """Without guidance nothing is batched in LTX and CogVideoX either."""
    pipe = getattr(tinypipes, family)(torch.float32)
    expected = of_pipeline(pipe, family, guidance_scale=1.0)
    assert_same_bits(of_chain(pipe, family, guidance_scale=1.0), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ltx_from_an_image_bit_for_bit_without_guidance(dtype: torch.dtype) -> None:
    pipe = tinypipes.ltx_image(dtype)
    arguments = {"guidance_scale": 1.0, "image": [picture(), picture()]}
    expected = of_pipeline(pipe, "ltx", **arguments)
    assert_same_bits(of_chain(pipe, "ltx", **arguments), expected)
    inputs = prfl_fast.pipeline_inputs(pipe, **call("ltx", **arguments))
    first = 2 * 3  # tokens of a frame
    assert torch.equal(expected[:, :first], inputs["latents"][:, :first])
    assert not torch.equal(of_chain(pipe, "ltx", **arguments | {"image": picture()}), expected), "the image must matter"
    # Latents that hold the first frame need no image, and keep their graph.
    given = inputs["latents"].double().requires_grad_()
    without = call("ltx", **arguments | {"image": None, "latents": given})
    assert_same_bits(of_chain(pipe, "ltx", **without), expected)
    sample = prfl_fast.unrolled_sample(**prfl_fast.pipeline_inputs(pipe, **without))
    sample.latents[:, first:].float().square().sum().backward()
    assert given.grad is not None and given.grad[:, :first].abs().sum() > 0, "later frames look at the first"


def test_several_videos_per_prompt_and_a_generator_each() -> None:
    pipe = tinypipes.wan(torch.float32)

    def arguments() -> dict[str, Any]:
        return {"num_videos_per_prompt": 2, "generator": [torch.Generator().manual_seed(i) for i in range(4)]}

    expected = of_pipeline(pipe, "wan", **arguments())
    assert expected.shape[0] == 4
    assert_same_bits(of_chain(pipe, "wan", **arguments()), expected)


def test_embeddings_and_latents_instead_of_prompt_and_generator() -> None:
    pipe = tinypipes.wan(torch.float32)
    first = prfl_fast.pipeline_inputs(pipe, **call("wan"))
    given = {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": first["conditioning"]["encoder_hidden_states"],
        "negative_prompt_embeds": first["negative_conditioning"]["encoder_hidden_states"],
        "latents": first["latents"],
    }
    expected = of_pipeline(pipe, "wan")
    pipe.text_encoder = None
    assert_same_bits(of_chain(pipe, "wan", **given), expected)
    assert_same_bits(of_chain(pipe, "wan", **given | {"latents": None}), expected)


# Within the dtype's rounding elsewhere.


def in_float64(inputs: dict[str, Any]) -> Tensor:
    """The same chain, network and solver in float64: what the rounded ones are measured against."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    inputs = dict(inputs)
    for name in {"transformer", "transformer_2"} & inputs.keys():
        # Module.to itself: diffusers' own would keep parts in float32.
        inputs[name] = nn.Module.to(copy.deepcopy(inputs[name]), torch.float64)
    for name in {"conditioning", "negative_conditioning"} & inputs.keys():
        inputs[name] = {key: wide(value) for key, value in inputs[name].items()}
    inputs["latents"] = inputs["latents"].double()
    return prfl_fast.unrolled_sample(**inputs, gradient="none", solver="table").latents


def assert_within_rounding(pipe: Any, family: str, solver: str, scale: float, **arguments: Any) -> None:
    """The chain rounds as often as the pipeline, in another order.

    The pipeline's own distance from float64 is the unit u. It must itself be rounding: a call errs by about eps of its
    prediction (norms between the blocks keep errors from growing), guidance makes (2 s - 1) eps of that, and the
    schedule sums predictions with weights of total 1. Two computations with u of error each differ by at most 2 u.
    """
    expected = of_pipeline(pipe, family, **arguments).double()
    truth = in_float64(prfl_fast.pipeline_inputs(pipe, **call(family, **arguments)))
    unit = (expected - truth).norm()
    eps = torch.finfo(pipe.transformer.dtype).eps
    assert 0 < unit <= (2 * scale - 1) * eps * truth.norm()
    actual = of_chain(pipe, family, solver, **arguments).double()
    assert (actual - expected).norm() <= 2 * unit
    assert (actual - truth).norm() <= 2 * unit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", ["scheduler", "auto"])
def test_ltx(dtype: torch.dtype, solver: str) -> None:
    pipe = tinypipes.ltx(dtype)
    assert_within_rounding(pipe, "ltx", solver, 3.0, guidance_scale=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", ["scheduler", "auto"])
def test_ltx_from_an_image(dtype: torch.dtype, solver: str) -> None:
    pipe = tinypipes.ltx_image(dtype)
    assert_within_rounding(pipe, "ltx", solver, 3.0, guidance_scale=3.0, image=[picture(), picture()])


def test_ltx_with_rescaled_guidance_and_another_frame_rate() -> None:
    pipe = tinypipes.ltx(torch.float32)
    arguments = {"guidance_scale": 4.0, "guidance_rescale": 0.7, "frame_rate": 12}
    assert_within_rounding(pipe, "ltx", "scheduler", 4.0, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", ["scheduler", "auto"])
@pytest.mark.parametrize("version", ["2b", "5b", "1.5"])
def test_cogvideox(dtype: torch.dtype, solver: str, version: str) -> None:
    pipe = tinypipes.cogvideox(dtype, version=version)
    # Version 1.5 takes two latent frames at a time: the three of nine frames are padded to four.
    assert_within_rounding(pipe, "cogvideox", solver, 6.0, num_frames=9 if version == "1.5" else 5)


def test_cogvideox_with_dynamic_guidance_and_its_own_sizes() -> None:
    pipe = tinypipes.cogvideox(torch.float32)
    # The scale varies between 1 and 1 + s.
    sizes = {"height": None, "width": None, "num_frames": None}
    assert_within_rounding(pipe, "cogvideox", "scheduler", 4.0, guidance_scale=3.0, use_dynamic_cfg=True, **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
def test_table_of_a_wan_pipeline(dtype: torch.dtype, scheduler: str) -> None:
    pipe = tinypipes.wan(dtype, scheduler, experts=2)
    assert_within_rounding(pipe, "wan", "auto", 5.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_of_a_hunyuan_pipeline(dtype: torch.dtype) -> None:
    pipe = tinypipes.hunyuan(dtype)
    assert_within_rounding(pipe, "hunyuan", "auto", 3.0, true_cfg_scale=3.0)


FAMILIES = ["wan", "wan_image", "wan_vace", "hunyuan", "ltx", "ltx_image", "cogvideox"]


def given(family: str) -> tuple[str, dict[str, Any]]:
    """Whose sizes a family takes, and what its pipeline needs besides a prompt."""
    sizes = family.removesuffix("_image").removesuffix("_vace")
    more = {"wan_image": lambda: {"image": picture()}, "ltx_image": lambda: {"image": picture()}}
    more["wan_vace"] = lambda: {**ONE, **edit()}
    return sizes, more[family]() if family in more else {}


# Gradients.


def with_lora(pipe: Any) -> list[nn.Parameter]:
    """Adds a LoRA with a B that is not zero, as in the middle of a training; gives its parameters."""
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    parameters = []
    for name in ("transformer", "transformer_2"):
        transformer = getattr(pipe, name, None)
        if transformer is not None:
            transformer.requires_grad_(False)
            transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets))
            parameters += [p for p in transformer.parameters() if p.requires_grad]
    assert parameters
    return parameters


@pytest.mark.parametrize("solver", ["scheduler", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_that_of_the_pipelines_own_loop(family: str, solver: str) -> None:
    """The pipeline's call without its no_grad is a plain loop in one graph; LoRA gets the same gradient from both."""
    make = {"wan": lambda dtype: tinypipes.wan(dtype, experts=2)}.get(family, getattr(tinypipes, family))
    pipe = make(torch.float32)
    sizes, arguments = given(family)
    if family == "hunyuan":
        arguments["true_cfg_scale"] = 3.0
    lora = with_lora(pipe)
    plain_loop = type(pipe).__call__.__wrapped__
    latents = plain_loop(pipe, **call(sizes, **arguments), output_type="latent").frames
    weights = torch.randn_like(latents)
    expected = torch.autograd.grad((weights * latents).sum(), lora)

    inputs = prfl_fast.pipeline_inputs(pipe, **call(sizes, **arguments))
    sample = prfl_fast.unrolled_sample(**inputs, solver=solver)
    actual = torch.autograd.grad((weights * sample.latents).sum(), lora)
    # The adjoint runs through the same 2 N calls as the forward, so it errs as the latents do (assert_within_rounding,
    # 2 u <= 2 (2 s - 1) eps with s <= 6), once for the states at which it is taken and once for itself.
    bound = 2 * 22 * torch.finfo(torch.float32).eps
    total = torch.cat([g.flatten() for g in expected]).norm()
    assert total > 0
    difference = torch.cat([(a - e).flatten() for a, e in zip(actual, expected, strict=True)]).norm()
    assert difference <= bound * total
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in actual)


def test_lora_scale_of_the_pipelines_call() -> None:
    pipe = tinypipes.wan(torch.float32)
    with_lora(pipe)
    half = {"attention_kwargs": {"scale": 0.5}}
    expected = of_pipeline(pipe, "wan", **half)
    assert_same_bits(of_chain(pipe, "wan", **half), expected)
    assert not torch.equal(of_chain(pipe, "wan"), expected)


def test_given_latents_and_embeddings_keep_their_graph() -> None:
    for family, make in (("wan", tinypipes.wan), ("cogvideox", tinypipes.cogvideox)):
        pipe = make(torch.bfloat16)
        first = prfl_fast.pipeline_inputs(pipe, **call(family))
        leaves = {
            "prompt_embeds": first["conditioning"]["encoder_hidden_states"].float().requires_grad_(),
            # Wan rounds them to float32, CogVideoX scales them.
            "latents": first["latents"].double().requires_grad_(),
        }
        nothing = {"prompt": None, "negative_prompt": ["", ""] if family == "wan" else None, "guidance_scale": 1.0}
        inputs = prfl_fast.pipeline_inputs(pipe, **call(family, **nothing, **leaves))
        prfl_fast.unrolled_sample(**inputs).latents.float().square().sum().backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0, name


@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_no_decoder_is_called_in_a_prfl_step(graph: str) -> None:
    pipe = tinypipes.forbid_decoding(tinypipes.wan(torch.float32))
    with pytest.raises(AssertionError, match="decoder was called"):
        pipe(**call("wan"))
    reward = prfl_fast.LatentRewardModel.from_transformer(pipe.transformer, num_blocks=1, num_heads=2)
    reward.requires_grad_(False)
    lora = with_lora(pipe)
    inputs = prfl_fast.pipeline_inputs(pipe, **call("wan"))
    draw = torch.Generator().manual_seed(0)
    sample = prfl_fast.unrolled_sample(**inputs, gradient="prfl", graph=graph, generator=draw)
    logits = reward(sample.latents, sample.timestep, **inputs["conditioning"])
    prfl_fast.reward_feedback_loss(logits).backward()
    if graph == "steps":
        sample.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in lora)
    assert sum(float(p.grad.abs().sum()) for p in lora) > 0


# What stays as it was, and what is refused.


def state_of(pipe: Any) -> dict[str, Any]:
    parts = {n: p for n, p in pipe.components.items() if isinstance(p, nn.Module)}
    return {
        "attributes": {name: id(value) for name, value in vars(pipe).items()},
        "config": dict(pipe.config),
        "scheduler": {name: repr(value) for name, value in vars(pipe.scheduler).items()},
        "modes": {n: [m.training for m in p.modules()] for n, p in parts.items()},
        "versions": {n: [t._version for t in p.parameters()] for n, p in parts.items()},
        "trainable": {n: [t.requires_grad for t in p.parameters()] for n, p in parts.items()},
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_stays_as_it_was(family: str) -> None:
    pipe = getattr(tinypipes, family)(torch.float32)
    sizes, arguments = given(family)
    of_pipeline(pipe, sizes, **arguments)  # leaves a used scheduler behind
    before = state_of(pipe)
    random = torch.get_rng_state()
    inputs = prfl_fast.pipeline_inputs(pipe, **call(sizes, **arguments))
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert inputs["scheduler"] is not pipe.scheduler and inputs["transformer"] is pipe.transformer
    assert inputs["num_inference_steps"] is None and len(inputs["scheduler"].timesteps) == STEPS
    tensors = [v for v in inputs["conditioning"].values() if isinstance(v, Tensor)]
    assert tensors and not any(t.requires_grad for t in (*tensors, inputs["latents"]))
    prfl_fast.unrolled_sample(**inputs, gradient="none")
    assert state_of(pipe) == before


def test_a_scheduler_that_was_used_in_a_graph() -> None:
    pipe = tinypipes.wan(torch.float32)
    expected = of_pipeline(pipe, "wan")
    x = torch.randn(1, 16, 2, 4, 6, requires_grad=True)
    pipe.scheduler.set_timesteps(3)
    pipe.scheduler.step(2 * x, pipe.scheduler.timesteps[0], x)
    assert_same_bits(of_chain(pipe, "wan"), expected)


def test_the_generator_is_used_as_the_pipeline_uses_it() -> None:
    pipe = tinypipes.ltx(torch.float32)
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    of_pipeline(pipe, "ltx", generator=one)
    prfl_fast.pipeline_inputs(pipe, **call("ltx", generator=other))
    assert torch.equal(one.get_state(), other.get_state())


def test_an_error_while_encoding_leaves_gradients_on() -> None:
    pipe = tinypipes.wan(torch.float32)
    pipe.text_encoder.forward = None
    with pytest.raises(TypeError):
        prfl_fast.pipeline_inputs(pipe, **call("wan"))
    assert torch.is_grad_enabled()


def never(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("encoded before the arguments were checked")


@pytest.mark.parametrize(
    ("family", "arguments", "error", "message"),
    [
        ("wan", {"prompt": None}, ValueError, "prompt: expected a string"),
        ("wan", {"prompt": []}, ValueError, "prompt: expected at least one"),
        ("wan", {"prompt": 3}, ValueError, "prompt"),
        ("wan", {"num_frames": 6}, ValueError, "num_frames: expected a multiple of 4 plus 1, got 6"),
        ("wan", {"height": 24}, ValueError, "height"),
        ("wan", {"num_inference_steps": 0}, ValueError, "num_inference_steps: expected a whole number from 1, got 0"),
        ("wan", {"num_inference_steps": 2.0}, ValueError, "num_inference_steps"),
        ("wan", {"guidance_scale": float("nan")}, ValueError, "guidance_scale: expected a finite number, got nan"),
        ("wan", {"guidance_scale_2": 2.0}, ValueError, "guidance_scale_2"),
        ("wan", {"image": 1}, TypeError, "image: unknown for WanPipeline; expected some of prompt, negative_prompt"),
        ("wan", {"hight": 16, "output_type": "pil"}, TypeError, "hight, output_type: unknown for WanPipeline"),
        ("wan_image", {}, ValueError, "image: WanImageToVideoPipeline needs the first frame"),
        ("wan_vace", {}, ValueError, "prompt: WanVACEPipeline makes one video of one string at a time"),
        ("wan_vace", {**ONE, "num_videos_per_prompt": 2}, ValueError, "num_videos_per_prompt: WanVACEPipeline"),
        ("wan_vace", {**ONE, "conditioning_scale": [1, 1]}, ValueError, "conditioning_scale: .* 1 of them, .* got .2,"),
        ("wan_vace", {**ONE, "mask": [1]}, ValueError, "`mask` can only be passed if `video`"),
        ("wan_vace", {**ONE, "num_frames": 6}, ValueError, "num_frames: expected a multiple of 4 plus 1, got 6"),
        ("ltx_image", {}, ValueError, "image: LTXImageToVideoPipeline needs the first frame"),
        ("ltx", {"image": 1}, TypeError, "image: unknown for LTXPipeline"),
        ("hunyuan", {"prompt": None, "prompt_embeds": torch.ones(1, 6, 16)}, ValueError, "prompt_attention_mask"),
        ("ltx", {"height": 48}, ValueError, "height"),
        ("cogvideox", {"num_videos_per_prompt": 2}, TypeError, "num_videos_per_prompt: unknown for CogVideoXPipeline"),
    ],
)
def test_wrong_arguments(family: str, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    pipe = getattr(tinypipes, family)(torch.float32)
    pipe.text_encoder.forward = never
    with pytest.raises(error, match=message):
        prfl_fast.pipeline_inputs(pipe, **call(given(family)[0], **arguments))


def test_wrong_pipelines() -> None:
    import diffusers

    listed = (
        "pipe: expected one of WanPipeline, WanImageToVideoPipeline, WanVACEPipeline, HunyuanVideoPipeline, "
        "LTXPipeline, LTXImageToVideoPipeline, CogVideoXPipeline, got "
    )
    with pytest.raises(TypeError, match=listed + "NoneType"):
        prfl_fast.pipeline_inputs(None, prompt="a cat")

    class Other(diffusers.WanPipeline):
        def __call__(self) -> None:
            """Samples in some other way."""

    pipe = tinypipes.wan(torch.float32)
    pipe.__class__ = Other
    with pytest.raises(TypeError, match=listed + "Other"):
        prfl_fast.pipeline_inputs(pipe, **call("wan"))

    class Same(diffusers.WanPipeline):
        """Adds nothing to the call."""

    pipe.__class__ = Same
    assert prfl_fast.pipeline_inputs(pipe, **call("wan"))["transformer"] is pipe.transformer
    pipe.transformer = None
    with pytest.raises(ValueError, match="pipe: this Same holds no transformer"):
        prfl_fast.pipeline_inputs(pipe, **call("wan"))

    pipe = tinypipes.wan(torch.float32, experts=2)
    pipe.transformer_2 = None
    with pytest.raises(ValueError, match="boundary_ratio=0.85 needs a transformer_2"):
        prfl_fast.pipeline_inputs(pipe, **call("wan"))

    pipe = tinypipes.ltx(torch.float32, "ddim")
    with pytest.raises(ValueError, match="set_timesteps takes sigmas, mu; CogVideoXDDIMScheduler does not"):
        prfl_fast.pipeline_inputs(pipe, **call("ltx"))

    pipe = tinypipes.wan(torch.float32)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="holds no text_encoder; expected prompt_embeds"):
        prfl_fast.pipeline_inputs(pipe, **call("wan"))
