"""What the families have in common: a diffusers transformer, described by a few class attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from prfl_fast.models.base import check_batch
from prfl_fast.models.generic import GenericAdapter, first_tensor
from prfl_fast.models.trunk import SHARDED, Trunk, make_trunk
from prfl_fast.models.unusable import refuse_unusable


class TransformerAdapter(GenericAdapter):
    """A family. Subclasses set the attributes and, where their pipeline casts more than the latents, override a method.

    Attributes:
        layout: the latents' dimensions, a letter each: B batch, C channels, F frames, H height, W width, S tokens.
        block_lists: (attribute, config key of its length) in the order of execution.
        head: submodules and parameters of the network that only serve after the last block.
        text_width: config key of the width of ``encoder_hidden_states``; None where it is not of one tensor.
        cast: conditioning that the pipeline casts to the network's dtype.
        batched: conditioning with one row per sample.
        float_prediction: the pipeline takes the prediction in float32, whatever the network's dtype.
    """

    layout: ClassVar[str]
    block_lists: ClassVar[tuple[tuple[str, str], ...]]
    head: ClassVar[tuple[str, ...]]
    text_width: ClassVar[str | None]
    cast: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    batched: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    float_prediction: ClassVar[bool] = False

    @classmethod
    def inputs(
        cls,
        module: nn.Module,
        x: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Keywords of one call of ``module``, cast and expanded as the family's pipeline does."""
        dtype: Any = module.dtype
        timestep = cls.timestep(timestep, dtype)
        keywords = {"hidden_states": x, "timestep": timestep, **conditioning, **(overrides or {})}
        for name in ("hidden_states", *cls.cast):
            if isinstance(keywords.get(name), Tensor):
                keywords[name] = keywords[name].to(dtype)
        if keywords["timestep"].ndim == 0:
            keywords["timestep"] = keywords["timestep"].expand(x.shape[0])
        return keywords

    @classmethod
    def timestep(cls, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """The scheduler's timestep as the pipeline hands it to a network of this dtype; an override is not touched."""
        return timestep

    @classmethod
    def channels(cls, config: Any) -> tuple[int, int]:
        """Channels of the latents and of the network's input, which has more where ``prepare_input`` adds some."""
        return getattr(config, "out_channels", None) or config.in_channels, config.in_channels

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        """Patch size of each dimension of the layout that is cut into patches."""
        raise NotImplementedError

    @classmethod
    def needed(cls, config: Any) -> tuple[str, ...]:
        """Conditioning that a network of this config cannot do without; None does not count as given."""
        return ("encoder_hidden_states",)

    def blocks(self) -> list[tuple[str, nn.Module]]:
        lists = [(name, getattr(self.inner, name)) for name, _ in self.block_lists]
        return [(f"{name}.{i}", block) for name, blocks in lists for i, block in enumerate(blocks)]

    def validate(self, latents: Tensor, conditioning: Mapping[str, Any], *, prepared: bool) -> None:
        config = self.inner.config
        shape, layout = tuple(latents.shape), f"[{', '.join(self.layout)}]"
        if len(shape) != len(self.layout):
            raise ValueError(f"latents: expected {layout} for {self._name}, got {shape}")
        # The network's input may have more channels than the latents only where prepare_input adds them.
        given = shape[self.layout.index("C")]
        made, taken = self.channels(config)
        if given != made or (given != taken and not prepared):
            expected = made if prepared else taken
            hint = ""
            if made != taken and not prepared:
                hint = f": {made} of them are the latents', the others come from prepare_input"
            raise ValueError(f"latents: expected {expected} channels in {layout}{hint}, got {given} in {shape}")
        for letter, size in self.patch(config).items():
            if shape[self.layout.index(letter)] % size:
                raise ValueError(f"latents: expected {letter} of {layout} divisible by the patch {size}, got {shape}")
        super().validate(latents, conditioning, prepared=prepared)
        missing = [name for name in self.needed(config) if conditioning.get(name) is None]
        if missing and not prepared:
            raise ValueError(f"conditioning: {self._name} needs {', '.join(map(repr, missing))}, got None")
        for name in self.batched:
            check_batch(conditioning, name, shape[0])
        for name in self.cast:
            value = conditioning.get(name)
            if value is not None and not (isinstance(value, Tensor) and value.is_floating_point()):
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"conditioning: {name!r}: expected a tensor of a float dtype, got {got}")
        text = None if self.text_width is None else conditioning.get("encoder_hidden_states")
        if text is not None and (text.ndim != 3 or text.shape[2] != config[self.text_width]):
            raise ValueError(
                f"conditioning: 'encoder_hidden_states': expected [{shape[0]}, tokens, {config[self.text_width]}], "
                f"got {tuple(text.shape)}"
            )

    def __call__(
        self, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Any], overrides: Mapping[str, Any] | None
    ) -> Tensor:
        keywords = self.inputs(self.inner, x, timestep, conditioning, overrides)
        prediction = self.prediction(self.network(**keywords, return_dict=False))
        return prediction.float() if self.float_prediction else prediction

    def prediction(self, output: Any) -> Tensor:
        """The prediction, in the latents' layout, in what the network returns."""
        return first_tensor(output, self._name)

    @property
    def feature_dim(self) -> int:
        return int(self.inner.config.num_attention_heads * self.inner.config.attention_head_dim)

    def trunk(self, num_blocks: int, copy: bool) -> Trunk:
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(self.network).__mro__):
            raise ValueError(SHARDED)
        refuse_unusable(self.inner)
        return make_trunk(self.inner, type(self), num_blocks, copy)


class WithoutTrunk(TransformerAdapter):
    """A family whose calls are known, and whose token stream no reward reads yet."""

    head = ()

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        return {}

    @property
    def feature_dim(self) -> int:
        self._no_trunk()

    def trunk(self, num_blocks: int, copy: bool) -> Trunk:
        self._no_trunk()
