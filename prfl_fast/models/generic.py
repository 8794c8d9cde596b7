"""Networks without a file of their own: any callable, any module, any other diffusers transformer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from prfl_fast.models.base import Adapter, check_batch, check_keywords, check_tensors, unwrap

if TYPE_CHECKING:
    from prfl_fast.models.trunk import Trunk


class CallableAdapter(Adapter):
    """``net(x, t, **conditioning)``: any callable and any module; x and t as the scheduler gives them, not cast."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.inner = unwrap(network)
        function = self.inner.forward if isinstance(self.inner, nn.Module) else self.inner
        self._known, self._required = _keywords(function, skip=2)

    def module(self) -> nn.Module | None:
        return self.inner if isinstance(self.inner, nn.Module) else None

    def blocks(self) -> list[tuple[str, nn.Module]]:
        # By diffusers' habit: lists of the network itself, registered in the order in which they run.
        children = self.inner.named_children() if isinstance(self.inner, nn.Module) else ()
        lists = [(n, m) for n, m in children if isinstance(m, nn.ModuleList) and n.endswith(("blocks", "layers"))]
        return [(f"{name}.{i}", block) for name, blocks in lists for i, block in enumerate(blocks)]

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        check_keywords(conditioning, self._known, () if prepared else self._required, self._name)
        check_tensors(conditioning, latents.device)

    def __call__(
        self, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Any], overrides: Mapping[str, Any] | None
    ) -> Tensor:
        keywords = {"hidden_states": x, "timestep": timestep, **conditioning, **(overrides or {})}
        x, timestep = keywords.pop("hidden_states"), keywords.pop("timestep")
        return first_tensor(self.network(x, timestep, **keywords), self._name)

    @property
    def feature_dim(self) -> int:
        self._no_trunk()

    def trunk(self, num_blocks: int, copy: bool) -> Trunk:
        self._no_trunk()

    @property
    def _name(self) -> str:
        return getattr(self.inner, "__name__", type(self.inner).__name__)

    def _no_trunk(self) -> NoReturn:
        raise ValueError(
            "transformer: features are known for Wan, SkyReels V2, HunyuanVideo, LTX and CogVideoX, not for "
            f"{self._name}; any callable (latents, timestep, **conditioning) can serve as a reward instead"
        )


class GenericAdapter(CallableAdapter):
    """Any other diffusers transformer: ``hidden_states``, ``timestep``, and ``return_dict=False`` where it is taken."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self._known, self._required = _keywords(self.inner.forward, skip=0)
        self._fixed = {"return_dict": False} if self._known is not None and "return_dict" in self._known else {}
        own = {"hidden_states", "timestep", "return_dict"}
        self._known = None if self._known is None else self._known - own
        self._required = tuple(name for name in self._required if name not in own)

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        super().validate(latents, conditioning, prepared=prepared)
        # Some families take a list here, one entry a sample.
        if isinstance(conditioning.get("encoder_hidden_states"), Tensor):
            check_batch(conditioning, "encoder_hidden_states", latents.shape[0])

    def __call__(
        self, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Any], overrides: Mapping[str, Any] | None
    ) -> Tensor:
        keywords = {"hidden_states": x, "timestep": timestep, **conditioning, **(overrides or {})}
        keywords["hidden_states"] = keywords["hidden_states"].to(module_dtype(self.inner) or x.dtype)
        if keywords["timestep"].ndim == 0:
            keywords["timestep"] = keywords["timestep"].expand(x.shape[0])
        return first_tensor(self.network(**keywords, **self._fixed), self._name)


def takes_hidden_states(network: Any) -> bool:
    """Whether a module is called as diffusers' transformers are: by the keywords hidden_states and timestep."""
    if not isinstance(network, nn.Module):
        return False
    return {"hidden_states", "timestep"} <= inspect.signature(network.forward).parameters.keys()


def module_dtype(module: nn.Module) -> torch.dtype | None:
    """What a pipeline casts the network's input to: diffusers' own answer, or the first float parameter's dtype."""
    dtype = getattr(module, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def first_tensor(output: Any, who: str) -> Tensor:
    """The prediction in whatever a network returns: a tensor, a tuple, or diffusers' output with ``sample``."""
    if isinstance(output, (tuple, list)):
        output = output[0]
    elif not isinstance(output, Tensor):
        output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"{who}: expected a tensor, a tuple or an output with .sample, got {type(output).__name__}")
    return output


def _keywords(function: Any, skip: int) -> tuple[set[str] | None, tuple[str, ...]]:
    """Keywords that a function takes after its first ``skip`` parameters (None: any), and those without a default."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # built-in functions tell no signature
        return None, ()
    first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:skip]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in first]
    required = tuple(p.name for p in named if p.default is p.empty)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return (None if takes_any else {p.name for p in named}), required
