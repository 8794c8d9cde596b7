"""What one block costs under each keep-set, by tracing it alone on fake tensors.

The block runs twice in a row inside a checkpoint, as it stands in a network call that is recomputed: in the backward
the second run is walked first and leaves new gradients of the parameters and of inputs that blocks share; the first run
is walked with these in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from prfl_fast.memory.blocks import checkpointed
from prfl_fast.memory.keeps import ALL, NOTHING, parse_keep, unions
from prfl_fast.memory.pretend import refuse_hidden
from prfl_fast.memory.roofline import NO_WORK, Device, Work
from prfl_fast.memory.selective import CallMemory
from prfl_fast.memory.solver.chain import Mode
from prfl_fast.memory.trace import ROUNDING, storage_bytes, tensors_in
from prfl_fast.memory.tracer import Mark, Recording, Tracer


@dataclass(frozen=True)
class BlockCost:
    """One block under one keep-set. Bytes are live storages; a block owns its input, and its output is the next one's.

    Attributes:
        keep: the keep-set.
        kept: from the end of the forward to the end of the backward.
        forward_peak: of the forward, above what earlier blocks keep.
        backward: peak of the backward above ``kept``, gradients of the output included, where gradients of parameters
            and shared inputs are in place.
        backward_growing: the same where they are not: the new ones are in it.
        stays: what the backward holds longer where the call's graph is kept from its forward on: its own inputs.
        forward: work of the forward.
        walked: work of the backward, recomputation included.
    """

    keep: str
    kept: int
    forward_peak: int
    backward: int
    backward_growing: int
    stays: int
    forward: Work
    walked: Work


@dataclass(frozen=True)
class BlockTrace:
    """A kind of block: ``costs`` by keep-set, ``plain_peak`` of a forward that keeps nothing, and ``gradients``, the
    bytes of its parameters' gradients."""

    costs: tuple[BlockCost, ...]
    plain_peak: int
    gradients: int

    def modes(self, device: Device) -> list[Mode]:
        """The block's costs for :func:`prfl_fast.memory.solve_chain`, one mode a keep-set, in the order of ``costs``.

        ``extra_ns`` is the time of what is recomputed; the backward is that with all gradients in place.
        """
        fastest = min(device.nanoseconds(cost.walked) for cost in self.costs)
        return [
            Mode(
                cost.kept,
                max(cost.kept, cost.forward_peak),
                cost.backward,
                device.nanoseconds(cost.walked) - fastest,
                forward_ns=device.nanoseconds(cost.forward),
                backward_ns=fastest,
            )
            for cost in self.costs
        ]


class _Source(torch.autograd.Function):
    """A new tensor like the template; its gradient ends here."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, template: Tensor) -> Tensor:
        return torch.empty_like(template)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class Sink(torch.autograd.Function):
    """One number of the outputs; in the backward it marks the moment and makes their gradients."""

    @staticmethod
    def forward(ctx: Any, moment: Callable[[], None], *outputs: Tensor) -> Tensor:
        ctx.moment = moment
        ctx.templates = [_template(t) for t in outputs]
        return outputs[0].new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.moment()
        return (None, *(make() for make in ctx.templates))


def _template(tensor: Tensor) -> Callable[[], Tensor]:
    """Makes tensors like it, without holding its bytes."""
    shape, dtype, seed = tensor.shape, tensor.dtype, tensor.new_empty(0)
    return lambda: seed.new_empty(shape, dtype=dtype)


def trace_block(
    block: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    streams: frozenset[int] | None = None,
    forward: Callable[..., Any] | None = None,
    selective: bool = True,
    runs: int = 2,
) -> BlockTrace:
    """Costs of a block for every keep-set, from two traces: one that keeps all, one that keeps nothing.

    Args:
        block: its parameters are fake tensors.
        args, kwargs: example inputs; fake tensors, with ``requires_grad`` as in the call.
        streams: which leaves of ``(args, kwargs)`` belong to this block alone, as places in
            ``torch.utils._pytree.tree_flatten``; None: tensors of the shapes of the outputs. Others are shared by all.
        forward: called instead of ``block.forward``.
        selective: whether keep-sets other than ``"all"`` and ``"nothing"`` can be used.
        runs: 2; or 1 where only one call is differentiated, whose gradients go straight to the parameters.
    """
    forward = block.forward if forward is None else forward
    leaves, structure = tree_flatten((tuple(args), kwargs))
    leaves = [_fresh(leaf) for leaf in leaves]
    if streams is None:
        streams = _guess_streams(forward, leaves, structure)
    trainable = [p for p in block.parameters() if p.requires_grad]
    held = [t for t in (*trainable, *tensors_in(leaves)) if t.is_leaf]
    before = [(t, t.grad) for t in held]
    try:
        for t in held:
            t.grad = None
        whole = _trace(block, forward, leaves, structure, streams, ALL, runs)
        for t in held:
            t.grad = None
        bare = _trace(block, forward, leaves, structure, streams, NOTHING, runs)
    finally:
        for t, gradient in before:
            t.grad = gradient
    names = [NOTHING]
    if selective and bare.again is not None:
        names = unions({output.label for output in bare.again.outputs if not output.spoiled})
    costs = (whole.cost, *(cost for keep in names if (cost := _with(bare, keep)) != whole.cost))
    plain = max(whole.plain_peak, bare.plain_peak)
    return BlockTrace(costs, plain, sum(storage_bytes(p) for p in trainable))


def _fresh(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return torch.empty_like(leaf.detach()).requires_grad_(leaf.requires_grad)


def _guess_streams(forward: Callable[..., Any], leaves: list[Any], structure: Any) -> frozenset[int]:
    with torch.no_grad():
        args, kwargs = tree_unflatten(leaves, structure)
        shapes = [t.shape for t in tensors_in(forward(*args, **kwargs))]
    places = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.shape in shapes:
            shapes.remove(leaf.shape)
            places.append(place)
    return frozenset(places)


@dataclass(frozen=True)
class _Traced:
    """A traced keep-set: its cost, the peak of the call's first run, and recordings of the block's forward in the
    recomputed call and of its own recomputation, with the live bytes at their windows' starts."""

    cost: BlockCost
    plain_peak: int
    again: Recording | None = None
    again_from: int = 0
    own: Recording | None = None
    own_from: int = 0


def _with(bare: _Traced, keep: str) -> BlockCost:
    """The cost of a keep-set, told from the recordings of one that keeps nothing: its outputs live on from their birth
    in the forward to the same place in the recomputation."""
    labels = parse_keep(keep)
    if not labels or bare.again is None or bare.own is None:
        return bare.cost
    kept = [output for output in bare.again.outputs if output.label in labels and not output.spoiled]
    used = [output for output in bare.own.outputs if output.label in labels and not output.spoiled][: len(kept)]
    size, cost = sum(output.size for output in kept), bare.cost
    # Bytes that this keep-set adds after each operation: those of outputs that would have been let go by then.
    forward_peak = max(
        cost.forward_peak,
        cost.kept + size,
        *_added(bare.again.live, bare.again_from, [(o.died, o.size) for o in kept if o.died is not None], 0),
    )
    # And those that wait for their place.
    waiting = [(o.born, -o.size) for o in used]
    walk = max(cost.kept + cost.backward, *_added(bare.own.live, bare.own_from - cost.kept, waiting, size))
    growing = max(cost.kept + cost.backward_growing, walk)
    saved = NO_WORK
    for output in used:
        saved = saved + output.work
    return replace(
        cost,
        keep=keep,
        kept=cost.kept + size,
        forward_peak=forward_peak,
        backward=max(0, walk - cost.kept - size),
        backward_growing=max(0, growing - cost.kept - size),
        walked=cost.walked - saved,
    )


def _added(live: list[int], base: int, changes: list[tuple[int, int]], start: int) -> list[int]:
    """Live bytes above ``base`` after each operation, with ``start`` more, and each change from its place on."""
    steps = [0] * (len(live) + 1)
    for place, size in changes:
        steps[place] += size
    return [bytes_ - base + extra for bytes_, extra in zip(live, accumulate(steps, initial=start), strict=False)] or [0]


def _trace(
    block: nn.Module,
    forward: Callable[..., Any],
    leaves: list[Any],
    structure: Any,
    streams: frozenset[int],
    keep: str,
    runs: int,
) -> _Traced:
    memory = CallMemory({id(block): keep}, recomputed=True)
    tracer = Tracer()
    recordings: list[Recording] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with tracer.recording(block, recordings):
            return forward(*args, **kwargs)

    run = checkpointed(block, recorded, memory, None) if keep != ALL else forward
    anchor = torch.zeros((), requires_grad=True)
    windows: list[tuple[int, Mark]] = []  # live before a run, the mark at its end
    walks: list[tuple[Mark, int]] = []  # mark at the start of a walk, number of windows then

    def once() -> Tensor | None:
        start = tracer.mark().live
        own = [
            _made(anchor, leaf) if place in streams and isinstance(leaf, Tensor) else leaf
            for place, leaf in enumerate(leaves)
        ]
        args, kwargs = tree_unflatten(own, structure)
        outputs = [t for t in tensors_in(run(*args, **kwargs)) if t.requires_grad]
        total: Tensor | None = None
        if outputs:
            total = Sink.apply(lambda: walks.append((tracer.mark(), len(windows))), *outputs)  # type: ignore[no-untyped-call]
        del own, args, kwargs, outputs
        windows.append((start, tracer.mark()))
        return total

    def body(_: Tensor) -> list[Tensor | None]:
        memory.begin()
        with set_checkpoint_early_stop(True):
            return [once() for _ in range(runs)]

    with tracer:
        with set_checkpoint_early_stop(False):
            totals: Any = checkpoint(body, anchor, use_reentrant=False)
        totals = [t for t in totals if t is not None]
        if totals:
            refuse_hidden(totals, [anchor])
            torch.autograd.backward(totals)
        end = tracer.mark()
    plain = max(mark.peak - start for start, mark in windows[:runs])
    if not walks:
        return _Traced(BlockCost(keep, 0, plain, 0, 0, 0, windows[0][1].work, NO_WORK), plain)
    inner = windows[-runs:]
    kept = [max(0, mark.live - start - ROUNDING) if len(windows) > runs else 0 for start, mark in inner]
    # The run of the call again is part of the first walk; what it keeps lives when the block itself is walked.
    first = walks[0][0].live + sum(kept)
    last, peak = (walks[1][0].live, walks[1][0].peak) if runs > 1 else (first, end.peak)
    cost = BlockCost(
        keep=keep,
        kept=kept[0],
        forward_peak=max(mark.peak - start for start, mark in inner),
        backward=max(0, end.peak - last),
        backward_growing=max(0, peak - first),
        stays=0 if keep == ALL else sum(storage_bytes(leaves[s]) for s in streams if isinstance(leaves[s], Tensor)),
        forward=inner[0][1].work,
        walked=end.work,
    )
    if len(recordings) < 3 * runs:  # nothing is recomputed
        return _Traced(cost, plain)
    return _Traced(cost, plain, recordings[runs], inner[0][0], recordings[-1], last)


def _made(anchor: Tensor, leaf: Tensor) -> Tensor:
    if not leaf.requires_grad:
        return torch.empty_like(leaf)
    made: Tensor = _Source.apply(anchor, leaf.detach())  # type: ignore[no-untyped-call]
    return made
