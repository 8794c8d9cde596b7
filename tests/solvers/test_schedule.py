"""The denoised prediction as configured, for a network that knows clean latent and noise; noise levels."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prfl_fast.solvers.schedule import denoised_prediction, noise_levels


def scheduler(config: dict[str, Any], **attributes: Any) -> Any:
    return SimpleNamespace(config=config, **attributes)


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.7, 1.0])
def test_flow(sigma: float) -> None:
    clean, noise = torch.randn(2, 5, dtype=torch.float64)
    for config, more in (({"prediction_type": "flow_prediction"}, {}), ({}, {"scale_noise": None})):
        a, b = denoised_prediction(scheduler(config, **more), sigma, 1.0)
        x = (1 - sigma) * clean + sigma * noise
        assert torch.allclose(a * x + b * (noise - clean), clean, atol=1e-14)
        # Inverted: sigma runs from noise to clean, and so does the velocity.
        a, b = denoised_prediction(scheduler({**config, "invert_sigmas": True}, **more), sigma, 1.0)
        x = sigma * clean + (1 - sigma) * noise
        assert torch.allclose(a * x + b * (clean - noise), clean, atol=1e-14)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sigma", [0.01, 1.3, 80.0])
def test_diffusion(sigma: float, kind: str, unscaled: bool) -> None:
    clean, noise = torch.randn(2, 5, dtype=torch.float64)
    alpha = 1 / math.sqrt(1 + sigma**2)
    x = (clean + sigma * noise) * (1 if unscaled else alpha)
    m = {"epsilon": noise, "v_prediction": alpha * (noise - sigma * clean), "sample": clean}[kind]
    a, b = denoised_prediction(scheduler({"prediction_type": kind}), sigma, alpha if unscaled else 1.0)
    # Terms as large as sigma times the latents cancel: 80 * 4 * 2^-53 and a few roundings.
    assert torch.allclose(a * x + b * m, clean, atol=1e-12)


def test_pure_noise() -> None:
    assert denoised_prediction(scheduler({"prediction_type": "v_prediction"}), math.inf, 1.0) == (0.0, -1.0)
    assert math.isnan(denoised_prediction(scheduler({"prediction_type": "epsilon"}), math.inf, 1.0)[0])


def test_unknown_is_nan() -> None:
    for config, more, scale in (
        ({}, {}, 1.0),
        ({"prediction_type": "epsilon"}, {}, 0.6),
    ):
        assert all(math.isnan(v) for v in denoised_prediction(scheduler(config, **more), 0.5, scale))


def test_noise_levels_of_sigmas_and_of_alpha_bar() -> None:
    def levels(timesteps: list[int], offset: int = 0, **attributes: Any) -> list[float]:
        replay: Any = SimpleNamespace(
            scheduler=scheduler({}, **attributes),
            num_steps=len(timesteps),
            offset=offset,
            timesteps=torch.tensor(timesteps),
        )
        return noise_levels(replay).tolist()

    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert levels([9, 6], 1, sigmas=sigmas) == [0.75, 0.5, 0.25]
    bars = torch.tensor([0.9, 0.8, 0.5, 0.2])
    known = {"alphas_cumprod": bars, "num_inference_steps": 2}
    root = [math.sqrt((1 - b) / b) for b in bars.double().tolist()]
    assert levels([3, 1], final_alpha_cumprod=torch.tensor(1.0), **known) == pytest.approx([root[3], root[1], 0.0])
    assert levels([3, 1], **known) == pytest.approx([root[3], root[1], 0.0])
    # Cut short: the last step goes one stride on, not to the end.
    assert levels([3], **known) == pytest.approx([root[3], root[1]])
    assert all(math.isnan(v) for v in levels([3, 1]))
