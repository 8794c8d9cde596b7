"""Between forward and backward, one latent a step and one call's graph: live bytes counted, no allocator asked."""

from __future__ import annotations

import plainloop
import pytest
import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.memory.trace import ROUNDING, LiveBytes

pytest.importorskip("diffusers")

LATENT = torch.Size((1, 4, 8, 32, 32))
BYTES = 4 * LATENT.numel()


class Net(nn.Module):
    """A graph of 12 latents a call."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(12))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x * weight)
        return x


def peak(steps: int, graph: str, gradient: str, scheduler: str) -> int:
    net = Net()
    latents = torch.randn(LATENT)
    # Without the solver's probe, which the first chain pays.
    prfl_fast.unrolled_sample(net, plainloop.scheduler(scheduler), latents, steps, gradient="none")
    with LiveBytes() as live:
        sample = prfl_fast.unrolled_sample(
            net, plainloop.scheduler(scheduler), latents, steps, graph=graph, gradient=gradient
        )
        sample.latents.backward(torch.ones_like(sample.latents))
        if graph == "steps":
            sample.backward()
    assert net.weights.grad is not None
    return live.peak


@pytest.mark.parametrize("scheduler", ["unipc", "euler"])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_one_latent_a_step_and_one_graph(graph: str, scheduler: str) -> None:
    few, many = (peak(steps, graph, "full", scheduler) for steps in (6, 26))
    # A checkpoint keeps the random state besides, and each small tensor is counted as ROUNDING bytes.
    small = torch.get_rng_state().numel() + 40 * ROUNDING
    assert 0.99 * 20 * BYTES <= many - few <= 20 * (BYTES + small)
    # One call's graph (12 latents and as many products), 6 latents, the solver's state in float32 and float64.
    assert few <= (24 + 6 + 16) * BYTES


@pytest.mark.parametrize("gradient", ["last:1", "last:3", "step:2"])
@pytest.mark.parametrize("graph", ["chain", "steps"])
def test_steps_without_gradient_keep_nothing(graph: str, gradient: str) -> None:
    few, many = (peak(steps, graph, gradient, "unipc") for steps in (6, 26))
    assert many - few <= 20 * 40 * ROUNDING
