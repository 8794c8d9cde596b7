"""The chain as an ordinary autograd graph (``graph="chain"``).

The solver's steps are linear operations in the graph; each differentiated network call is one non-reentrant
checkpoint, the last one excepted, whose graph is kept. So what lives between forward and backward is one latent per
step and one call's graph, whatever the number of steps.

Taps whose masks agree on every step so far share one *lane*, that is one graph. Where they part, the values stay the
same and the graphs go their own ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states
from tqdm import tqdm

from prfl_fast.sampling.calls import Caller
from prfl_fast.sampling.guidance import Prediction
from prfl_fast.sampling.modes import StepWeights
from prfl_fast.sampling.nodes import prediction_node, root
from prfl_fast.sampling.request import Request
from prfl_fast.sampling.run import Run
from prfl_fast.sampling.sample import Sample, Tap


@dataclass
class _Lane:
    taps: tuple[int, ...]
    state: tuple[Tensor, ...]


def _split(request: Request, lanes: list[_Lane], step: int) -> list[tuple[_Lane, StepWeights]]:
    """Lanes of the taps that are still ahead, parted where this step's weights differ."""
    parted: list[tuple[_Lane, StepWeights]] = []
    for lane in lanes:
        groups: dict[StepWeights, list[int]] = {}
        for tap in lane.taps:
            if step < request.mode.taps[tap]:
                groups.setdefault(request.mode.weights(tap, step), []).append(tap)
        parted.extend((_Lane(tuple(taps), lane.state), weights) for weights, taps in groups.items())
    # Lanes with a gradient first: those without take their value.
    return sorted(parted, key=lambda pair: pair[1].zero)


class _RandomState:
    """The random state before a call, so that a second lane's call draws the same dropout."""

    def __init__(self, x: Tensor) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = get_device_states(x)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        set_device_states(*self._devices)


def _tap(request: Request, run: Run, x: Tensor, step: int) -> Tap:
    latents = root(x, run) if x.requires_grad else x
    return Tap(latents, request.timestep_after(step), float(request.solver.sigmas[step]), step)


def run_chain(request: Request) -> Sample:
    """Samples, and leaves the graph behind the taps."""
    run = Run(request)
    caller = Caller(request, run)
    solver, mode = request.solver, request.mode
    last_differentiated = max(
        (i for i in range(request.start_step, request.last_step) if request.differentiated(i)), default=-1
    )
    lanes = [_Lane(tuple(range(len(mode.taps))), solver.initial_state(request.latents))]
    taps: dict[int, Tap] = {}
    last_input = last_prediction = request.latents
    steps = range(request.start_step, request.last_step)
    with tqdm(steps, desc="sampling", unit="step", disable=not request.progress) as bar:
        for step in bar:
            parted = _split(request, lanes, step)
            gradient_lanes = sum(not weights.zero for _, weights in parted)
            random_state = _RandomState(lanes[0].state[0]) if gradient_lanes > 1 else None
            predictions: list[Prediction] = []
            for number, (lane, weights) in enumerate(parted):
                if weights.zero and predictions:
                    predictions.append(predictions[0].detach())
                    continue
                if number and random_state is not None:
                    random_state.restore()
                keep = step == last_differentiated and number == gradient_lanes - 1 and request.plan.keep_last_call
                made = caller.predict(step, lane.state[0], weights, keep)
                predictions.append(prediction_node(made, run, step))
            # After the calls, as in the scheduler's own loop: dropout and noise may share a generator.
            x, prediction = parted[0][0].state[0], predictions[0]
            noise = solver.draw_noise(step, x, request.generator, model_dtype=prediction.dtype)
            if step + 1 == request.last_step:
                last_input, last_prediction = x, prediction.combined()
            lanes = []
            for (lane, _), made in zip(parted, predictions, strict=True):
                state = solver.step(
                    step,
                    lane.state,
                    made.output,
                    noise,
                    request.latent_mask,
                    unconditional=made.unconditional,
                    guidance_scale=made.scale,
                )
                lanes.append(_Lane(lane.taps, state))
            del x, prediction, predictions, made, noise  # the next calls would live beside them
            for lane in lanes:
                for tap in lane.taps:
                    if mode.taps[tap] == step + 1:
                        taps[tap] = _tap(request, run, lane.state[0], step + 1)
    return Sample(
        taps=tuple(taps[k] for k in range(len(mode.taps))),
        plan=request.plan,
        gradient_mode=mode.name,
        _run=run,
        _last_input=last_input,
        _last_prediction=last_prediction,
        _original=solver.original_coefficients(request.last_step - 1),
    )
