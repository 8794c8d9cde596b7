"""One network call of the chain, constant or differentiable, and the prediction of one or two of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from prfl_fast.memory.blocks import recompute_blocks
from prfl_fast.memory.selective import CallMemory
from prfl_fast.models.base import Adapter
from prfl_fast.sampling.guidance import Prediction
from prfl_fast.sampling.modes import StepWeights
from prfl_fast.sampling.nodes import scale_gradient
from prfl_fast.sampling.recovery import has_weight_hooks
from prfl_fast.sampling.request import Conditioning, Request
from prfl_fast.sampling.run import Run
from prfl_fast.sampling.watch import CallWatch


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Parameters out of the graph for one call: its input's gradient alone is wanted."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """Autocast keeps the weights that it has cast until its region is left. In older torch those of a call without
    gradient served a later call with one, whose weights then got none, in silence (pytorch/pytorch#65766)."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _checkpoints_itself_scaled(module: nn.Module, conditioning: Conditioning) -> bool:
    """Whether the model was given gradient checkpointing and the call scales its LoRA layers. diffusers undoes that
    scale when the call is left, before the blocks' own checkpoints run again."""
    scaled = any(
        name.endswith("attention_kwargs") and isinstance(value, dict) and value.get("scale", 1.0) != 1.0
        for name, value in conditioning.items()
    )
    return scaled and any(getattr(part, "gradient_checkpointing", False) is True for part in module.modules())


def _must_run_to_its_end(network: Any, own_backwards: bool) -> bool:
    """Whether something waits for the end of a recomputation, which otherwise stops at the last tensor that is needed.

    diffusers' hooks (layerwise casting, group offload) put a layer's weights back when its forward is left. DDP expects
    a backward, to reduce its gradients, only after a forward that it has seen to its end: with a backward for each step
    all but the first would stay on their own rank. What a plain callable holds is not known.
    """
    if not isinstance(network, nn.Module):
        return True
    if has_weight_hooks(network):
        return True
    return own_backwards and any(isinstance(part, DistributedDataParallel) for part in network.modules())


def detach_conditioning(conditioning: Conditioning) -> Conditioning:
    """The same keyword arguments, tensors cut from the graph."""
    detached: Conditioning = tree_map_only(Tensor, Tensor.detach, conditioning)
    return detached


class Caller:
    """Makes the network calls of one request. Everything that a recomputation needs is bound by value, here."""

    def __init__(
        self,
        request: Request,
        run: Run,
        conditioning: Sequence[Conditioning] | None = None,
        negative: Sequence[Conditioning] | None = None,
        *,
        own_backwards: bool = False,
    ) -> None:
        self._request = request
        self._run = run
        self._conditioning = request.conditioning if conditioning is None else conditioning
        self._negative = request.negative if negative is None else negative
        networks = {id(n): n for n in (network.adapter.network for network in request.networks)}
        adapters = dict.fromkeys(id(network.adapter) for network in request.networks)
        self._networks = {key: number for number, key in enumerate(adapters)}
        self._whole = {key for key, n in networks.items() if _must_run_to_its_end(n, own_backwards)}

    def _evaluate(
        self,
        step: int,
        adapter: Adapter,
        memory: CallMemory | None,
        watch: CallWatch | None,
        freeze: bool,
        x: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """The call itself; runs once in the forward and once more when it is recomputed in a backward."""
        request, run = self._request, self._run
        with run.undoing(), ExitStack() as stack:
            stack.enter_context(_autocast_without_cache())
            stack.enter_context(run.guard.same_scales())
            run.network_calls += 1
            if run.in_backward:
                run.guard.check()
            module = adapter.module()
            if id(adapter.network) in self._whole:
                stack.enter_context(set_checkpoint_early_stop(False))  # of blocks that are checkpoints themselves
            if freeze and module is not None:
                stack.enter_context(frozen(module))
            if torch.is_grad_enabled() and module is not None:
                if memory is not None or _checkpoints_itself_scaled(module, conditioning):
                    blocks = [block for _, block in adapter.blocks()]
                    own = None if watch is None else watch.again
                    if own is not None:
                        stack.enter_context(set_checkpoint_early_stop(False))  # to see each block's output
                    stack.enter_context(recompute_blocks(module, blocks, memory, own))
            if watch is not None:
                stack.enter_context(watch.watching())
            timestep = request.timesteps[step]
            scaled = request.solver.scale_input(step, x)
            overrides = request.prepare_input(scaled, timestep, step) if request.prepare_input else None
            prediction = adapter(scaled, timestep, conditioning, overrides)
            if watch is not None:
                watch.output(prediction)
            return prediction

    def _watch(self, step: int, adapter: Adapter, branch: str) -> CallWatch | None:
        request = self._request
        if not (request.verify_recompute or request.detect_nonfinite):
            return None
        return CallWatch(
            f"step {step}, {branch} branch",
            adapter.blocks(),
            self._run.undoing,
            nonfinite=request.detect_nonfinite,
            recompute=request.verify_recompute,
        )

    def constant(self, step: int, branch: str, x: Tensor, conditioning: Conditioning) -> Tensor:
        """A call without gradient."""
        adapter = self._network(step).adapter
        with torch.no_grad():
            watch = self._watch(step, adapter, branch)
            return self._evaluate(step, adapter, None, watch, False, x.detach(), conditioning)

    def _memory(self, adapter: Adapter, keep_graph: bool) -> CallMemory | None:
        """What the blocks of one call keep; None: none is a checkpoint."""
        plan = self._request.plan
        blocks = [block for _, block in adapter.blocks()]
        if plan.recompute == "call" or not blocks:
            return None
        keeps = plan.keeps_of(self._networks[id(adapter)], len(blocks), last=keep_graph)
        return CallMemory(dict(zip(map(id, blocks), keeps, strict=True)), recomputed=not keep_graph)

    def differentiable(
        self, step: int, branch: str, x: Tensor, conditioning: Conditioning, weights: StepWeights, keep_graph: bool
    ) -> Tensor:
        """A call with a backward: a non-reentrant checkpoint, or the kept graph itself.

        The weights act outside the network: the output's gradient is scaled by the parameter weight, and the
        input's by the ratio of the two; so one vector-Jacobian product serves both.
        """
        adapter = self._network(step).adapter
        freeze = weights.parameters == 0
        outer = weights.input if freeze else weights.parameters
        x = x.detach() if weights.input == 0 else scale_gradient(x, weights.input / outer)
        if freeze:
            conditioning = detach_conditioning(conditioning)
        memory, watch = self._memory(adapter, keep_graph), self._watch(step, adapter, branch)
        call = partial(self._evaluate, step, adapter, memory, watch, freeze)
        if keep_graph:
            prediction = call(x, conditioning)
        else:
            # A recomputation stops at the last tensor that the backward needs; to compare outputs it must not.
            whole = self._request.verify_recompute or id(adapter.network) in self._whole
            with set_checkpoint_early_stop(not whole):
                result: Any = checkpoint(call, x, conditioning, use_reentrant=False)
            prediction = result
        return scale_gradient(prediction, outer)

    def predict(self, step: int, x: Tensor, weights: StepWeights, keep_graph: bool) -> Prediction:
        """The prediction of a step, of one branch or two; ``keep_graph`` keeps the graph of its last differentiable
        call."""
        request = self._request
        network = self._network(step)
        conditioning = self._conditioning[step - request.start_step]
        both = network.guided and request.guidance.both_branches
        if weights.zero:
            conditional = self.constant(step, "conditional", x, conditioning)
        else:
            conditional = self.differentiable(
                step, "conditional", x, conditioning, weights, keep_graph and not both
            )
        if not network.guided:
            return Prediction(conditional)
        negative = self._negative[step - request.start_step]
        if weights.zero or not request.guidance.both_branches:
            unconditional = self.constant(step, "unconditional", x, negative)
        else:
            unconditional = self.differentiable(step, "unconditional", x, negative, weights, keep_graph)
        return request.guidance.predict(
            conditional, unconditional, network.scale, step, fused=request.solver.linear
        )

    def _network(self, step: int) -> Any:
        return self._request.networks[step - self._request.start_step]
