"""What the chain and the reward know of a network: one call as its pipeline makes it, its blocks, its trunk.

An :class:`Adapter` belongs to one network. ``adapter.trunk(num_blocks, copy=...)`` gives the embedders and the first
blocks as a module of their own, a :class:`prfl_fast.models.trunk.Trunk`: ``trunk(latents, timestep, **conditioning)``
is the video-token stream ``[B, L, D]`` after these blocks, before any final norm. Shared (``copy=False``) it holds the
live transformer's submodules themselves; copied it stands alone, and its ``state_dict`` (keys ``body.`` + the
transformer's own) has neither later blocks nor head. ``trunk.dim`` is D, ``trunk.blocks()`` its named blocks,
``trunk.config`` a JSON-able dictionary from which :func:`prfl_fast.models.trunk_from_config` rebuilds it, without
weights.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from prfl_fast.models.trunk import Trunk


class Adapter(ABC):
    """One network, called as its family's pipeline calls it. Holds no state of its own beside the network, which
    :attr:`network` is as it was given, wrappers and all."""

    network: Any

    @abstractmethod
    def module(self) -> nn.Module | None:
        """The module inside all wrappers (compile, DDP, peft), or None for a plain callable."""

    @abstractmethod
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Named blocks in the order of execution; empty when they are not known."""

    @abstractmethod
    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        """Check one call's arguments, without a call.

        ``prepared`` tells that ``prepare_input`` makes overrides: it may add channels and missing keywords, so the
        latents need the channels of the network's output only, and no keyword is required.

        Raises:
            ValueError: layout, channels, divisibility by the patch, an unknown or missing keyword, another batch or
                device than the latents', NaN.
            TypeError: a keyword's value that is no tensor where the family needs one.
        """

    @abstractmethod
    def __call__(
        self, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Any], overrides: Mapping[str, Any] | None
    ) -> Tensor:
        """One network call; differentiable.

        Args:
            x: scaled latents in the pipeline's layout, any float dtype; cast to the network's where its pipeline does.
            timestep: 0-dimensional or ``[B]``, as the scheduler gives it.
            conditioning: keyword arguments.
            overrides: replace ``hidden_states``, ``timestep`` or any keyword.

        Returns:
            The prediction, in the latents' layout (fewer channels where ``overrides`` added some).
        """

    @property
    def num_blocks(self) -> int:
        """How many blocks :meth:`blocks` names."""
        return len(self.blocks())

    @property
    @abstractmethod
    def feature_dim(self) -> int:
        """Width of the token stream that :meth:`features` gives. Raises ValueError without a trunk."""

    @abstractmethod
    def trunk(self, num_blocks: int, copy: bool) -> Trunk:
        """Embedders and first ``num_blocks`` blocks as a module, shared with the network or copied.

        Raises ValueError when ``num_blocks`` is not in 1..:attr:`num_blocks`, or when the network has no trunk.
        """

    def features(self, num_blocks: int, latents: Tensor, timestep: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
        """The video-token stream ``[B, L, D]`` after the first ``num_blocks`` blocks, in the network's dtype.

        ``timestep`` is 0-dimensional or ``[B]``. Later blocks and the head are not run.
        """
        features: Tensor = self.trunk(num_blocks, copy=False)(latents, timestep, **conditioning)
        return features


def unwrap(network: Any) -> Any:
    """The network inside torch.compile, DDP, FSDP's first form and peft; anything else as it is."""
    while True:
        names = {cls.__name__ for cls in type(network).__mro__}
        if "OptimizedModule" in names:
            network = network._orig_mod
        elif names & {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"}:
            network = network.module
        elif "PeftModel" in names:
            network = network.get_base_model()
        else:
            return network


def check_keywords(
    conditioning: Mapping[str, Any], known: Collection[str] | None, required: Collection[str], who: str
) -> None:
    """Refuse keywords that ``who`` does not take (``known`` None: it takes any) and name those that it lacks."""
    for name in conditioning:
        if name in ("hidden_states", "timestep", "return_dict"):
            raise ValueError(
                f"conditioning: {name!r} is given by the chain itself; prepare_input can replace it, step by step"
            )
        if known is not None and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it takes {', '.join(sorted(known)) or 'none'}"
            raise ValueError(f"conditioning: {who} takes no keyword {name!r}{hint}")
    missing = [name for name in required if name not in conditioning]
    if missing:
        raise ValueError(f"conditioning: {who} needs {', '.join(map(repr, missing))}, which is not given")


def check_tensors(conditioning: Mapping[str, Any], device: torch.device) -> None:
    """Refuse NaN (infinity is allowed: additive masks hold it) and another device than the latents'."""
    for name, value in conditioning.items():
        # Rotary tables come as a pair, some families' text as a list.
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.device != device:
                raise ValueError(
                    f"conditioning: {name!r} lies on {tensor.device}, expected the latents' device {device}"
                )
            if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
                raise ValueError(f"conditioning: {name!r} holds NaN")


def check_batch(conditioning: Mapping[str, Any], name: str, batch: int) -> None:
    """``conditioning[name]``, when given, must be a tensor with ``batch`` rows."""
    value = conditioning.get(name)
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"conditioning: {name!r}: expected a tensor, got {type(value).__name__}")
    if value.ndim == 0 or value.shape[0] != batch:
        raise ValueError(
            f"conditioning: {name!r}: expected a batch of {batch} as the latents ask for, got {tuple(value.shape)}"
        )
