"""CogVideoXPipeline with CogVideoX's DPM scheduler, whose step the pipeline hands its last denoised prediction."""

from __future__ import annotations

from typing import Any

import pytest
import tinypipes
import torch
from torch import Tensor

import prfl_fast

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

STEPS = 5


def pipeline() -> Any:
    pipe = tinypipes.cogvideox(torch.float32)
    # As published with CogVideoX-5B.
    pipe.scheduler = diffusers.CogVideoXDPMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
        beta_schedule="scaled_linear",
    )
    return pipe


def arguments(generator: Any, **more: Any) -> dict[str, Any]:
    prompts = {"prompt": [tinypipes.PROMPT, "a cat"], "negative_prompt": [tinypipes.NEGATIVE, ""]}
    return {**tinypipes.SIZES["cogvideox"], **prompts, "num_inference_steps": STEPS, "generator": generator, **more}


def generators(per_sample: bool = False) -> Any:
    return [torch.Generator().manual_seed(k) for k in (3, 4)] if per_sample else torch.Generator().manual_seed(3)


def of_chain(pipe: Any, generator: Any, solver: str, **more: Any) -> Tensor:
    """The generator that drew the latents draws the noise of the steps, as in the pipeline."""
    inputs = prfl_fast.pipeline_inputs(pipe, **arguments(generator, **more))
    return prfl_fast.unrolled_sample(**inputs, generator=generator, solver=solver, gradient="none").latents


@pytest.mark.parametrize("per_sample", [False, True])
def test_bit_for_bit_without_guidance(per_sample: bool) -> None:
    pipe = pipeline()
    expected = pipe(**arguments(generators(per_sample), guidance_scale=1.0), output_type="latent").frames
    actual = of_chain(pipe, generators(per_sample), "scheduler", guidance_scale=1.0)
    assert actual.dtype == expected.dtype and bool(expected.isfinite().all()) and expected.std() > 0.1
    assert actual.equal(expected)


@pytest.mark.parametrize("solver", ["scheduler", "auto"])
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_table_and_batched_guidance_within_rounding(solver: str, scale: float) -> None:
    # Each call errs by about eps of its prediction (norms between the blocks keep errors from growing) and guidance
    # makes (2 s - 1) eps of that; a second-order step weighs predictions by at most 2, in 5 steps. Twice, for both.
    pipe = pipeline()
    expected = pipe(**arguments(generators(), guidance_scale=scale), output_type="latent").frames
    actual = of_chain(pipe, generators(), solver, guidance_scale=scale)
    eps = torch.finfo(torch.float32).eps
    assert (actual - expected).norm() <= 2 * STEPS * 2 * (2 * scale - 1) * eps * expected.norm()
    other = of_chain(pipe, torch.Generator().manual_seed(4), solver, guidance_scale=scale)
    assert (other - expected).norm() > 0.1 * expected.norm()


def test_the_pipelines_scheduler_stays_as_it_is() -> None:
    pipe = pipeline()
    inputs = prfl_fast.pipeline_inputs(pipe, **arguments(generators()))
    prfl_fast.unrolled_sample(**inputs, gradient="none", generator=generators())
    for scheduler in (pipe.scheduler, inputs["scheduler"]):
        assert type(scheduler) is diffusers.CogVideoXDPMScheduler
        assert not {"old_pred_original_sample", "timestep_back"} & vars(scheduler).keys()


def test_refused_schedulers_are_refused_before_the_prompt_is_encoded() -> None:
    pipe = pipeline()
    pipe.encode_prompt = None  # would raise another error
    pipe.scheduler = diffusers.KarrasVeScheduler()
    with pytest.raises(TypeError, match="scheduler: KarrasVeScheduler is not supported: the network is called on"):
        prfl_fast.pipeline_inputs(pipe, **arguments(generators()))
    pipe.scheduler = diffusers.DDPMScheduler(variance_type="learned")
    with pytest.raises(TypeError, match="DDPMScheduler with variance_type='learned' is not supported"):
        prfl_fast.pipeline_inputs(pipe, **arguments(generators()))
