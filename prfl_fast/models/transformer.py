"""What the four families have in common: a diffusers transformer, described by a few class attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from prfl_fast.models.base import check_batch
from prfl_fast.models.generic import GenericAdapter, first_tensor
from prfl_fast.models.trunk import Trunk, make_trunk


class TransformerAdapter(GenericAdapter):
    """A family. Subclasses set the attributes and, where their pipeline casts more than the latents, override a method.

    Attributes:
        layout: the latents' dimensions, a letter each: B batch, C channels, F frames, H height, W width, S tokens.
        block_lists: (attribute, config key of its length) in the order of execution.
        head: submodules and parameters of the network that only serve after the last block.
        cast: conditioning that the pipeline casts to the network's dtype.
        batched: conditioning with one row per sample.
        required: conditioning that the network cannot do without.
    """

    layout: ClassVar[str]
    block_lists: ClassVar[tuple[tuple[str, str], ...]]
    head: ClassVar[tuple[str, ...]]
    cast: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    batched: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    required: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)

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
        keywords = {"hidden_states": x, "timestep": timestep, **conditioning, **(overrides or {})}
        for name in ("hidden_states", *cls.cast):
            if isinstance(keywords.get(name), Tensor):
                keywords[name] = keywords[name].to(dtype)
        if keywords["timestep"].ndim == 0:
            keywords["timestep"] = keywords["timestep"].expand(x.shape[0])
        return keywords

    @classmethod
    def patch(cls, config: Any) -> dict[str, int]:
        """Patch size of each dimension of the layout that is cut into patches."""
        raise NotImplementedError

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
        made = getattr(config, "out_channels", None) or config.in_channels
        if given != made or (given != config.in_channels and not prepared):
            expected = made if prepared else config.in_channels
            hint = ""
            if made != config.in_channels and not prepared:
                hint = f": {made} of them are the latents', the others come from prepare_input"
            raise ValueError(f"latents: expected {expected} channels in {layout}{hint}, got {given} in {shape}")
        for letter, size in self.patch(config).items():
            if shape[self.layout.index(letter)] % size:
                raise ValueError(f"latents: expected {letter} of {layout} divisible by the patch {size}, got {shape}")
        super().validate(latents, conditioning, prepared=prepared)
        for name in self.batched:
            check_batch(conditioning, name, shape[0])

    def __call__(
        self, x: Tensor, timestep: Tensor, conditioning: Mapping[str, Any], overrides: Mapping[str, Any] | None
    ) -> Tensor:
        keywords = self.inputs(self.inner, x, timestep, conditioning, overrides)
        return first_tensor(self.network(**keywords, return_dict=False), self._name)

    @property
    def feature_dim(self) -> int:
        return int(self.inner.config.num_attention_heads * self.inner.config.attention_head_dim)

    def trunk(self, num_blocks: int, copy: bool) -> Trunk:
        return make_trunk(self.inner, type(self), num_blocks, copy)
