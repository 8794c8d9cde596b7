"""What one network call costs, piece by piece: its blocks traced alone, and what lies before, between and behind them.

The call itself runs on fake tensors with stand-ins for its blocks, so its price grows with the number of *different*
blocks only. Pieces alternate: gap, block, gap, ..., block, gap; the first gap holds the embedders, the last one the
final projection. A network without known blocks is one gap.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from prfl_fast.memory.block_cost import BlockCost, BlockTrace, Sink, trace_block
from prfl_fast.memory.keeps import ALL, parse_keep, unions
from prfl_fast.memory.pretend import refuse_hidden
from prfl_fast.memory.roofline import NO_WORK, Work
from prfl_fast.memory.trace import ROUNDING, storage_bytes
from prfl_fast.memory.tracer import Mark, Tracer


@dataclass(frozen=True)
class Piece:
    """A block (``block`` its place among the blocks) or a gap (None).

    ``costs`` are as in :class:`BlockCost`; both backwards count what later pieces' gradients add. ``gradients``: bytes
    of its parameters' gradients.
    """

    block: int | None
    costs: tuple[BlockCost, ...]
    gradients: int = 0

    def cost(self, keep: str) -> BlockCost:
        """The cost under a keep-set; labels that none of its operations has don't matter."""
        found = {cost.keep: cost for cost in self.costs}
        if keep not in found:
            wanted = parse_keep(keep)
            present = {label for name in found for label in parse_keep(name) or ()}
            keep = ALL if wanted is None else unions(wanted & present)[-1]
        return found.get(keep, self.costs[0])


@dataclass(frozen=True)
class CallCost:
    """One network call.

    Attributes:
        pieces: in the order of the forward; none for a call without gradient.
        plain_peak: peak of a forward that keeps nothing.
        forward: work of the forward.
    """

    pieces: tuple[Piece, ...]
    plain_peak: int
    forward: Work


class BlockTraces:
    """Traces of blocks by what they depend on, so that identical ones are traced once."""

    def __init__(self) -> None:
        self.made: dict[Any, BlockTrace] = {}

    def of(
        self, block: nn.Module, seen: _Seen, forward: Callable[..., Any], selective: bool, runs: int
    ) -> BlockTrace:
        """The trace of a block for inputs like these."""
        key = (kind_of(block), seen.key, selective, runs)
        if key not in self.made:
            args, kwargs = tree_unflatten(seen.leaves, seen.structure)
            self.made[key] = trace_block(
                block, args, kwargs, streams=seen.streams, forward=forward, selective=selective, runs=runs
            )
        return self.made[key]


def kind_of(block: nn.Module) -> Any:
    """Blocks of one kind cost the same for the same inputs."""
    held = (*block.named_parameters(), *block.named_buffers())
    shapes = tuple((name, tuple(t.shape), t.dtype, t.requires_grad) for name, t in held)
    return tuple(type(m) for m in block.modules()), shapes, block.training, _settings(block)


def _settings(block: nn.Module) -> tuple[Any, ...]:
    plain = (int, float, bool, str, type(None))
    return tuple(
        tuple((k, v) for k, v in vars(m).items() if isinstance(v, plain) and not k.startswith("_layer_"))
        for m in block.modules()
    )


class _Seen:
    """Inputs of one call of a block: fresh leaves like them, and who holds them."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, self.structure = tree_flatten((args, kwargs))
        self.holders = {
            place: weakref.ref(leaf.untyped_storage()) for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
        }
        self.keys = {place: _key(leaves[place]) for place in self.holders}
        self.leaves = [
            torch.empty_like(leaf.detach()).requires_grad_(leaf.requires_grad)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else leaf
            for leaf in leaves
        ]
        self.streams: frozenset[int] = frozenset()

    def settle(self) -> None:
        """Called when the next block begins: inputs that have been let go by then were this block's own."""
        self.streams = frozenset(place for place, holder in self.holders.items() if holder() is None)

    def shared(self) -> dict[int, int]:
        """Bytes of the gradients of inputs that other blocks have too, by the inputs' identity."""
        return {
            self.keys[place]: storage_bytes(leaf)
            for place, leaf in enumerate(self.leaves)
            if place not in self.streams and isinstance(leaf, Tensor) and leaf.requires_grad
        }

    @property
    def key(self) -> Any:
        described = tuple(
            (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in self.leaves
        )
        return described, str(self.structure), self.streams


class _Outputs:
    """Outputs of a block: new tensors, or some of its inputs."""

    def __init__(self, output: Any, leaves: Sequence[Any]) -> None:
        made, self._structure = tree_flatten(output)
        inputs = {_key(leaf): place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self._made: list[Any] = [
            inputs.get(_key(t), torch.empty_like(t.detach())) if isinstance(t, Tensor) else (t,) for t in made
        ]

    def shapes(self) -> list[torch.Size]:
        """Shapes of the new outputs."""
        return [t.shape for t in self._made if isinstance(t, Tensor)]

    def cotangents(self) -> int:
        """Bytes of the gradients of the new outputs."""
        return sum(storage_bytes(t) for t in self._made if isinstance(t, Tensor) and t.is_floating_point())

    def stand_in(
        self, leaves: Sequence[Any], trained: bool, moment: Callable[[], None], saved: Sequence[Tensor] = ()
    ) -> Any:
        """Outputs like the block's, made of nothing; ``saved`` is kept for the backward, which calls ``moment``."""
        templates = [t for t in self._made if isinstance(t, Tensor)]
        wanting = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if trained and torch.is_grad_enabled():
            wanting.append(templates[0].new_empty((), dtype=torch.float32).requires_grad_())
        made = iter(_StandIn.apply(moment, templates, saved, *wanting))  # type: ignore[no-untyped-call]
        out = [next(made) if isinstance(t, Tensor) else leaves[t] if isinstance(t, int) else t[0] for t in self._made]
        return tree_unflatten(out, self._structure)


class _StandIn(torch.autograd.Function):
    """Makes outputs like the block's from nothing, and in the backward gradients like its inputs."""

    @staticmethod
    def forward(
        ctx: Any, moment: Callable[[], None], templates: list[Tensor], saved: Sequence[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.moment = moment
        ctx.save_for_backward(*saved)  # as a checkpoint does
        ctx.inputs = [(t.shape, t.dtype, t.new_empty(0)) for t in inputs]
        return tuple(torch.empty_like(t) for t in templates)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.moment()
        del gradients
        _ = ctx.saved_tensors
        return (None, None, None, *(seed.new_empty(shape, dtype=dtype) for shape, dtype, seed in ctx.inputs))


@contextmanager
def _instead(blocks: Sequence[nn.Module], forward: Callable[[nn.Module, Callable[..., Any]], Any]) -> Iterator[None]:
    """While active, each block's forward is what ``forward(block, original)`` gives."""
    unique = {id(block): block for block in blocks}.values()
    saved = [(block, vars(block).get("forward"), "forward" in vars(block)) for block in unique]
    try:
        for block in unique:
            vars(block)["forward"] = forward(block, block.forward)
        yield
    finally:
        for block, value, present in saved:
            if present:
                vars(block)["forward"] = value
            else:
                vars(block).pop("forward", None)


Call = Callable[[], Tensor]


def trace_call(
    call: Call,
    blocks: Sequence[nn.Module],
    traces: BlockTraces,
    *,
    selective: bool = True,
    differentiable: bool = True,
    runs: int = 2,
) -> CallCost:
    """Costs of one network call.

    Args:
        call: makes the call on fake tensors and gives its prediction.
        blocks: the network's blocks, in the order of execution.
        traces: of blocks that were seen before; filled here.
        selective: whether the blocks can be used with keep-sets other than ``"all"`` and ``"nothing"``.
        differentiable: the call has a backward.
        runs: 2; or 1 where only this call is differentiated, whose gradients go straight to the parameters.
    """
    seen, outputs, forwards = _look(call, blocks, differentiable)
    if not differentiable:
        peak, work = _without_gradient(call, blocks)
        return CallCost((), peak, work)
    known = [traces.of(block, s, forwards[id(block)], selective, runs) for block, s in seen]
    return _Profile(call, blocks, [s for _, s in seen], outputs, known, runs).cost()


def _look(
    call: Call, blocks: Sequence[nn.Module], differentiable: bool
) -> tuple[list[tuple[nn.Module, _Seen]], list[_Outputs], dict[int, Callable[..., Any]]]:
    """Inputs and outputs of each block, in the order of execution; blocks of one kind run once."""
    seen: list[tuple[nn.Module, _Seen]] = []
    outputs: list[_Outputs] = []
    forwards: dict[int, Callable[..., Any]] = {}
    kinds: dict[Any, _Outputs] = {}
    made: list[set[int]] = []  # storages of each block's outputs

    def instead(block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        forwards[id(block)] = original

        def run(*args: Any, **kwargs: Any) -> Any:
            if seen:
                seen[-1][1].settle()
            here = _Seen(args, kwargs)
            seen.append((block, here))
            kind = (kind_of(block), here.key)
            leaves, _ = tree_flatten((args, kwargs))
            if kind not in kinds:
                with torch.no_grad():
                    kinds[kind] = _Outputs(original(*args, **kwargs), leaves)
            outputs.append(kinds[kind])
            del args, kwargs
            out = kinds[kind].stand_in(leaves, _trained(block), _nothing)
            made.append({_key(t) for t in tree_flatten(out)[0] if isinstance(t, Tensor)})
            return out

        return run

    with _instead(blocks, instead), torch.set_grad_enabled(differentiable):
        prediction = call()
        del prediction
        if seen:
            _settle_last(seen, outputs, made)
    return seen, outputs, forwards


@contextmanager
def stand_ins(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """While active, blocks of one kind run once, and later ones give new tensors that look the same."""
    kinds: dict[Any, _Outputs] = {}

    def instead(block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            leaves, _ = tree_flatten((args, kwargs))
            kind = (kind_of(block), _Seen(args, kwargs).key)
            if kind not in kinds:
                with torch.no_grad():
                    kinds[kind] = _Outputs(original(*args, **kwargs), leaves)
            return kinds[kind].stand_in(leaves, _trained(block), _nothing)

        return run

    with _instead(blocks, instead):
        yield


def _settle_last(seen: list[tuple[nn.Module, _Seen]], outputs: list[_Outputs], made: list[set[int]]) -> None:
    """Own inputs of the last block, behind which no other one tells: what the one before made, or what looks like the
    block's output."""
    last = seen[-1][1]
    if len(seen) > 1:
        last.streams = frozenset(place for place, key in last.keys.items() if key in made[-2])
        return
    shapes = outputs[-1].shapes()
    places = []
    for place in last.keys:
        if last.leaves[place].shape in shapes:
            shapes.remove(last.leaves[place].shape)
            places.append(place)
    last.streams = frozenset(places)


def _nothing() -> None:
    pass


def _trained(block: nn.Module) -> bool:
    return any(p.requires_grad for p in block.parameters())


def _without_gradient(call: Call, blocks: Sequence[nn.Module]) -> tuple[int, Work]:
    with Tracer() as tracer, torch.no_grad():
        call()
        mark = tracer.mark()
    return mark.peak, mark.work


class _Profile:
    """Two calls under a checkpoint each, in one graph, with stand-ins for the blocks."""

    def __init__(
        self,
        call: Call,
        blocks: Sequence[nn.Module],
        seen: list[_Seen],
        outputs: list[_Outputs],
        traces: list[BlockTrace],
        runs: int,
    ) -> None:
        self._count = runs
        self._call, self._blocks, self._seen, self._outputs, self._traces = call, blocks, seen, outputs, traces
        self._tracer = Tracer()
        # Of each run of the call: a mark where it begins, and at each block's entry and exit, and where it ends.
        self._runs: list[list[Mark]] = []
        # Of each backward: marks where it begins and where each block's begins.
        self._walks: list[list[Mark]] = []
        self._place = 0
        self._prediction = 0
        self._kept = 0

    def cost(self) -> CallCost:
        anchor = torch.zeros((), requires_grad=True)

        def body(_: Tensor) -> Any:
            self._runs.append([self._tracer.mark()])
            self._place = 0
            prediction = self._call()
            self._prediction = storage_bytes(prediction)
            self._runs[-1].append(self._tracer.mark())
            total = Sink.apply(self._begin, prediction) if prediction.requires_grad else None  # type: ignore[no-untyped-call]
            del prediction
            # What the call's own frames held is gone now.
            self._kept = self._tracer.current - self._runs[-1][0].live - (0 if total is None else ROUNDING)
            return total

        with self._tracer, _instead(self._blocks, self._instead):
            with set_checkpoint_early_stop(False):
                totals: list[Any] = [checkpoint(body, anchor, use_reentrant=False) for _ in range(self._count)]
            totals = [t for t in totals if t is not None]
            if totals:
                refuse_hidden(totals, [anchor])
                torch.autograd.backward(totals)
            end = self._tracer.mark()
        forward = NO_WORK
        for mark in self._runs[0][1:]:
            forward = forward + mark.work
        for trace in self._traces:
            forward = forward + trace.costs[0].forward
        plain = self._plain_peak()
        if not totals:
            return CallCost((), plain, forward)
        return self._compose(plain, forward, end)

    def _instead(self, block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            place = self._place
            self._place += 1
            self._runs[-1].append(self._tracer.mark())
            leaves, _ = tree_flatten((args, kwargs))
            del args, kwargs
            shared = [leaves[k] for k in self._seen[place].holders if k not in self._seen[place].streams]
            out = self._outputs[place].stand_in(leaves, _trained(block), lambda: self._reach(place), shared)
            del leaves, shared
            self._runs[-1].append(self._tracer.mark())
            return out

        return run

    def _begin(self) -> None:
        self._walks.append([self._tracer.mark()])

    def _reach(self, place: int) -> None:
        self._walks[-1].append(self._tracer.mark())

    def _own(self, place: int) -> int:
        """Bytes of a block's own inputs."""
        seen = self._seen[place]
        keys = {_key(seen.leaves[s]): storage_bytes(seen.leaves[s]) for s in seen.streams}
        return sum(keys.values())

    def _plain_peak(self) -> int:
        run = self._runs[0]
        start, peak = run[0].live, 0
        for place, trace in enumerate(self._traces):
            entry = run[1 + 2 * place]
            peak = max(peak, entry.peak - start, entry.live - self._own(place) - start + trace.plain_peak)
        return max(peak, run[-1].peak - start)

    def _compose(self, plain: int, forward: Work, end: Mark) -> CallCost:
        run = self._runs[self._count] if len(self._runs) > self._count else self._runs[0]
        entered = self._sums(run)
        # Tensors that only the call's frames hold are there in the forward and gone in the backward.
        sums = [min(bytes_, max(0, self._kept)) for bytes_ in entered]
        # The second call is walked first: its new gradients stay. What it leaves is in place for the first call's.
        settled = self._walk(self._count - 1, sums, end)
        growing = settled if self._count == 1 else self._walk(0, sums, self._walks[1][0])
        count = len(self._traces)
        later = [sum(trace.gradients for trace in self._traces[place:]) for place in range(count + 1)]
        pieces: list[Piece] = []
        for place in range(count + 1):
            before = sums[place - 1] if place else 0
            entry = run[1 + 2 * place]
            cost = BlockCost(
                keep=ALL,
                kept=sums[place] - before,
                forward_peak=max(sums[place] - before, entry.peak - run[0].live - before),
                backward=settled.gaps[place],
                backward_growing=growing.gaps[place] + later[place],
                stays=0,
                forward=entry.work,
                walked=settled.work[place],
            )
            pieces.append(Piece(None, (cost,)))
            if place == count:
                break
            beside = settled.beside[place] + self._new_shared(place)
            costs = tuple(
                replace(
                    c,
                    forward_peak=c.forward_peak + entered[place] - sums[place],
                    backward=max(0, c.backward + beside),
                    backward_growing=max(0, c.backward_growing + growing.beside[place] + later[place + 1]),
                )
                for c in self._traces[place].costs
            )
            pieces.append(Piece(place, costs, self._traces[place].gradients))
        return CallCost(tuple(pieces), plain, forward)

    def _sums(self, run: list[Mark]) -> list[int]:
        """What the gaps up to each one keep."""
        start = run[0].live
        sums = [run[1 + 2 * place].live - self._own(place) - start for place in range(len(self._traces))]
        sums.append(run[-1].live - self._prediction - start)
        return [max(0, *sums[: place + 1]) for place in range(len(sums))]

    def _walk(self, number: int, sums: list[int], end: Mark) -> _Walk:
        """One backward: of each gap its peak above what gaps up to it keep, of each block what is beside it."""
        marks, count = self._walks[number], len(self._traces)
        runs = self._runs[self._count :]
        base = runs[number][0].live if number < len(runs) else marks[0].live
        ends = [*reversed(marks[1:]), end] if len(marks) == count + 1 else [end] * (count + 1)
        # ends[i]: where block i is reached, the last one: where all ends. Gap i is walked until block i - 1 is reached.
        reached, over = ends[:count], ends[count]
        gaps = [
            max(0, (over if place == 0 else reached[place - 1]).peak - base - sums[place]) for place in range(count + 1)
        ]
        work = [(over if place == 0 else reached[place - 1]).work for place in range(count + 1)]
        # Below zero where the prediction's gradient, which is there when the walk begins, has been let go.
        beside = [
            reached[place].live - base - sums[place] - self._outputs[place].cotangents() for place in range(count)
        ]
        return _Walk(gaps, beside, work)

    def _new_shared(self, place: int) -> int:
        """Gradients of shared inputs that no later block has made."""
        later = {key for seen in self._seen[place + 1 :] for key in seen.shared()}
        return sum(size for key, size in self._seen[place].shared().items() if key not in later)


@dataclass(frozen=True)
class _Walk:
    gaps: list[int]
    beside: list[int]
    work: list[Work]


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
