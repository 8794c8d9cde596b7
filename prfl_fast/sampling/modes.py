"""Gradient modes: what each step's network call gives to the parameters and passes on to its input.

A mode is nothing but two weights per step, so every published way of cutting the chain is a mask over the same chain:

=============  =============================================================================================
``full``       every step gives and passes on: the exact gradient
``last:K``     the last K steps (DRaFT-K, arXiv 2309.17400)
``step:I``     network call I only (ReFL, arXiv 2304.05977, is ``last:1`` or a random I)
``prfl``       one step I drawn at random, and the chain ends right after it (PRFL, arXiv 2511.21541)
``random``     the last K steps, K drawn uniformly from 1 to all (AlignProp, arXiv 2310.03739)
``random:K``   K distinct steps drawn at random
``uniform:K``  K evenly spaced steps with a random offset
``drtune:K``   the same with network inputs cut (DRTune, arXiv 2405.00760)
``none``       no gradient: a plain sampler
=============  =============================================================================================

VideoX-Fun's reward training (``train_reward_lora.py``) differentiates the steps of a list and detaches the prediction
of every other: weights (1, 1), or (1, 0) with ``--stop_latent_model_input_gradient``, and (0, 0), as here. Its flags,
with K for ``--backprop_num_steps``:

==================================================================  ================================================
VideoX-Fun                                                          ``gradient=``
==================================================================  ================================================
``--backprop_strategy last``                                        ``"last:1"``
``--backprop_strategy tail``                                        ``"last:K"``
``--backprop_strategy uniform``                                     ``"uniform:K"``
``--backprop_strategy uniform --stop_latent_model_input_gradient``  ``"drtune:K"``
``--backprop_strategy random``                                      ``"random:K"``
``--backprop_step_list 3 5 9``                                      ``GradientMode.at_steps((3, 5, 9))``
``--backprop_step_list 3 5 9 --stop_latent_model_input_gradient``   ``GradientMode.at_steps((3, 5, 9), input=0)``
==================================================================  ================================================

Two differences: its ``uniform`` offset may be one too many, and the last step then falls off the end; and its
``--backprop_random_start_step`` and ``--backprop_random_end_step`` bound the draw, for which there is
``GradientMode.at_steps(random.sample(range(start, end + 1), K))``. The other strategies with the inputs cut are
``at_steps(..., input=0)``, too. Its ``--num_decoded_latents n`` is
``decode=PixelDecoder(vae, latent_frames=slice(n))``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

GeneratorLike = torch.Generator | Sequence[torch.Generator] | None

_KINDS = ("full", "last:K", "step:I", "prfl", "random", "random:K", "uniform:K", "drtune:K", "none")


@dataclass(frozen=True)
class StepWeights:
    """Weights of one network call: ``parameters`` scales its parameter and conditioning gradient, ``input`` the
    gradient that it passes on to the latent that it was given. (1, 1) is the exact gradient, (0, 0) a constant."""

    parameters: float
    input: float

    @property
    def zero(self) -> bool:
        """True where the call needs no backward at all."""
        return self.parameters == 0 and self.input == 0


EXACT = StepWeights(1.0, 1.0)
CONSTANT = StepWeights(0.0, 0.0)
INPUT_CUT = StepWeights(1.0, 0.0)


@dataclass(frozen=True)
class GradientMode:
    """A mask over the chain, written out: ``parameters[i]`` and ``input[i]`` for step i, counted from the first step
    of the schedule. Steps beyond the end of the tuples are constant.

    Use it for masks that have no name, for instance ``GradientMode(parameters=(0, .5, 1), input=(0, 1, 1))``.
    """

    parameters: tuple[float, ...]
    input: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("parameters", "input"):
            values = getattr(self, name)
            if not all(isinstance(v, (int, float)) and v == v and abs(v) != float("inf") for v in values):
                raise ValueError(f"GradientMode.{name}: expected finite numbers, one per step; got {values!r}")
        if len(self.parameters) != len(self.input):
            raise ValueError(
                f"GradientMode: parameters has {len(self.parameters)} entries and input has {len(self.input)}; "
                "expected one of each per step"
            )

    @classmethod
    def at_steps(cls, steps: Iterable[int], *, parameters: float = 1.0, input: float = 1.0) -> GradientMode:
        """These weights at the steps that are listed (0-based, from the first of the schedule), none at the others.

        Raises:
            ValueError: no step, or one that is no whole number from 0.
        """
        chosen = list(steps)
        if not chosen or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in chosen):
            raise ValueError(f"steps: expected at least one, whole numbers from 0; got {chosen!r}")
        return _mask(max(chosen) + 1, chosen, StepWeights(parameters, input))

    def weights(self, step: int) -> StepWeights:
        """The two weights of one step (0-based)."""
        if step >= len(self.parameters):
            return CONSTANT
        return StepWeights(float(self.parameters[step]), float(self.input[step]))


@dataclass(frozen=True)
class ResolvedMode:
    """A mode after its draws: one mask per tap, and the taps themselves (numbers of steps taken)."""

    name: str
    taps: tuple[int, ...]
    masks: tuple[GradientMode, ...]

    def weights(self, tap: int, step: int) -> StepWeights:
        """Weights of ``step`` in the chain that ends at tap number ``tap``."""
        return self.masks[tap].weights(step)


def _mask(num_steps: int, chosen: Sequence[int] | range, weights: StepWeights = EXACT) -> GradientMode:
    inside = set(chosen)
    return GradientMode(
        tuple(weights.parameters if i in inside else 0.0 for i in range(num_steps)),
        tuple(weights.input if i in inside else 0.0 for i in range(num_steps)),
    )


def draw_integer(low: int, high: int, generator: GeneratorLike) -> int:
    """An integer from ``[low, high)``, the same on every rank.

    Rank 0's draw is broadcast: ranks that differentiate different steps would call the sharded model a different
    number of times, and hang. Per-rank noise generators are not touched by the broadcast.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        generator = generator[0] if len(generator) else None
    device = generator.device if generator is not None else torch.device("cpu")
    value = int(torch.randint(low, high, (1,), generator=generator, device=device))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def _draw_subset(count: int, low: int, high: int, generator: GeneratorLike) -> list[int]:
    """``count`` distinct integers of ``[low, high)``: a partial Fisher-Yates shuffle."""
    pool = list(range(low, high))
    for i in range(count):
        j = draw_integer(i, len(pool), generator)
        pool[i], pool[j] = pool[j], pool[i]
    return sorted(pool[:count])


def _argument(mode: str, text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"gradient={mode!r}: expected a whole number after the colon, got {text!r}") from None
    if not low <= value < high:
        raise ValueError(f"gradient={mode!r}: the number must be in {low}..{high - 1} for this chain, got {value}")
    return value


def _evenly_spaced(count: int, start: int, stop: int, generator: GeneratorLike) -> list[int]:
    """``count`` steps with the same distance from one to the next, from a random offset within one distance."""
    length = stop - start
    gap = length // count
    offset = draw_integer(0, length - gap * (count - 1), generator)
    return [start + offset + gap * k for k in range(count)]


def resolve_mode(
    gradient: str | GradientMode,
    *,
    num_steps: int,
    start_step: int,
    stop_step: int | None,
    supervise: tuple[int, ...] | None,
    generator: GeneratorLike,
) -> ResolvedMode:
    """Turns the ``gradient`` argument into masks, drawing what is random.

    Args:
        gradient: a name from the table above or a :class:`GradientMode`.
        num_steps: steps of the whole schedule.
        start_step: first step of this chain.
        stop_step: number of the step at which the chain ends, or None for the whole schedule.
        supervise: taps, counted as ``stop_step`` is, or None.
        generator: source of the random modes' draws (a list: its first).

    Raises:
        ValueError: an unknown mode, or a number that does not fit the chain.
    """
    taps = supervise if supervise is not None else (stop_step if stop_step is not None else num_steps,)
    last = taps[-1]
    if isinstance(gradient, GradientMode):
        if len(gradient.parameters) > num_steps:
            raise ValueError(
                f"gradient: the GradientMode has {len(gradient.parameters)} steps, the schedule only {num_steps}"
            )
        return ResolvedMode("custom", taps, tuple(gradient for _ in taps))
    if not isinstance(gradient, str):
        raise TypeError(
            f"gradient: expected a string ({', '.join(_KINDS)}) or a GradientMode, got {type(gradient).__name__}"
        )
    kind, colon, text = gradient.partition(":")
    numbered = {"last", "step", "uniform", "drtune"}
    plain = {"full", "prfl", "none"}
    if kind not in numbered | plain | {"random"} or (kind in plain and colon) or (kind in numbered and not colon):
        raise ValueError(f"gradient: unknown mode {gradient!r}; expected one of {', '.join(_KINDS)} or a GradientMode")
    steps = last - start_step

    if kind == "prfl":
        if supervise is not None:
            raise ValueError("gradient='prfl' ends the chain at the step that it draws; it can't be given supervise")
        chosen = draw_integer(start_step, last, generator)
        return ResolvedMode(gradient, (chosen + 1,), (_mask(num_steps, [chosen]),))
    if kind == "full":
        return ResolvedMode(gradient, taps, tuple(_mask(num_steps, range(start_step, tap)) for tap in taps))
    if kind == "none":
        return ResolvedMode(gradient, taps, tuple(_mask(num_steps, ()) for _ in taps))
    if kind == "last" or (kind == "random" and not colon):
        count = _argument(gradient, text, 1, steps + 1) if kind == "last" else draw_integer(1, steps + 1, generator)
        masks = [_mask(num_steps, range(max(start_step, tap - count), tap)) for tap in taps]
        return ResolvedMode(gradient, taps, tuple(masks))
    if kind == "step":
        drawn = [_argument(gradient, text, start_step, last)]
    elif kind == "random":
        drawn = _draw_subset(_argument(gradient, text, 1, steps + 1), start_step, last, generator)
    else:
        drawn = _evenly_spaced(_argument(gradient, text, 1, steps + 1), start_step, last, generator)
    weights = INPUT_CUT if kind == "drtune" else EXACT
    masks = [_mask(num_steps, [i for i in drawn if i < tap], weights) for tap in taps]
    return ResolvedMode(gradient, taps, tuple(masks))
