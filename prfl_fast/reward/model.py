"""The latent process reward: the first blocks of a video transformer, a learned query, a small perceptron."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.models import adapter_for
from prfl_fast.models.base import unwrap
from prfl_fast.reward import files, published
from prfl_fast.reward.pool import QueryAttentionPool, RewardHead


class LatentRewardModel(nn.Module):
    """Scores a noisy latent at any noise level: ``logits = mlp(pool(trunk(latents, timestep, **conditioning)))``.

    The architecture of PRFL's reward model (arXiv 2511.21541): the token stream after the first blocks of the generator
    without any final norm, one learned query with its residual, 1024, 512, 1. No decoder is involved.

    What gets gradients. Always the latents and the conditioning. Of the parameters:

    - A trunk of its own (``copy=True``, and what is loaded): every parameter, so that the reward can be trained as
      PRFL trains it. To train a generator *by* the reward call ``reward.requires_grad_(False)`` first: gradients
      still pass through to the latents.
    - A shared trunk (``copy=False``): the head only. The transformer's blocks are constants to the reward even where
      the transformer trains them; they get no gradient from it, and the reward's ``parameters()``, ``state_dict()``,
      ``to()``, ``train()`` and ``requires_grad_()`` do not reach them. The score moves when the transformer is
      trained: share to train a head on a transformer at rest, copy to train a generator.

    Args:
        trunk: ``trunk(latents, timestep, **conditioning) -> [B, L, dim]``.
        dim: width of the tokens.
        num_heads: heads of the pooling.
        shared: the trunk belongs to a live transformer.
    """

    trunk: Any

    def __init__(self, trunk: nn.Module, dim: int, num_heads: int = 8, *, shared: bool = False) -> None:
        super().__init__()
        self.shared = shared
        if shared:
            self.__dict__["trunk"] = trunk  # unregistered: see the class docstring
        else:
            self.trunk = trunk
        self.query_attention = QueryAttentionPool(dim, 1, num_heads)
        self.mlp = RewardHead(dim)

    @classmethod
    def from_transformer(
        cls, transformer: nn.Module, num_blocks: int = 8, num_heads: int = 8, *, copy: bool = True
    ) -> LatentRewardModel:
        """A reward model over the first ``num_blocks`` blocks of ``transformer``, with a new head.

        The head is float32 (float64 over a float64 transformer) whatever the trunk's dtype: its products are small,
        and low-precision masters do not move at the learning rates of rewards.

        Args:
            transformer: a diffusers transformer of a known family (Wan, HunyuanVideo, LTX, CogVideoX).
            num_blocks: in 1..its number of blocks.
            num_heads: heads of the pooling, a divisor of the transformer's width.
            copy: whether the trunk is a copy, which is made trainable, or the transformer's own blocks.

        Raises:
            ValueError: a transformer without known features, ``num_blocks`` or ``num_heads`` out of range.
        """
        adapter = adapter_for(transformer)
        if num_heads < 1 or adapter.feature_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of the transformer's width {adapter.feature_dim}, got {num_heads}"
            )
        trunk = adapter.trunk(num_blocks, copy)
        model = cls(trunk, trunk.dim, num_heads, shared=not copy)
        if copy:
            trunk.requires_grad_(True)
        else:
            model.__dict__["_transformer"] = unwrap(transformer)
        return model._place_head()

    @property
    def num_blocks(self) -> int:
        """Blocks of the trunk."""
        return len(self.trunk.blocks())

    def forward(self, latents: Tensor, timestep: Tensor, **conditioning: Any) -> Tensor:
        """Logits ``[B]`` in the head's dtype; the reward is their sigmoid.

        Args:
            latents: in the pipeline's layout, any float dtype: the model input at ``timestep``.
            timestep: that of the latents, 0-dimensional or ``[B]``: ``sample.timestep`` after a chain.
            conditioning: the transformer's keywords (``encoder_hidden_states=...``).
        """
        if self.shared:
            with self._constant_trunk():
                features = self.trunk(latents, timestep, **conditioning)
        else:
            features = self.trunk(latents, timestep, **conditioning)
        logits: Tensor = self.mlp(self.query_attention(features).squeeze(1))
        return logits

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to ``folder``, which is made when missing.

        Over a shared trunk only the head is written: the transformer is yours to keep.
        """
        files.save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, transformer: nn.Module | None = None) -> LatentRewardModel:
        """Read what :meth:`save_pretrained` wrote, in the dtypes it was written in, on the CPU.

        Args:
            folder: local.
            transformer: the transformer to share, when the saved model shared one; not to be given otherwise. The
                head goes to its device.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a wrong config; missing, unexpected or misshapen tensors; ``transformer`` given or not.
        """
        folder = Path(folder)
        config = files.read_config(folder)
        shared, num_heads = bool(config["shared"]), int(config["num_heads"])
        if shared != (transformer is not None):
            hint = "without its trunk: give the transformer" if shared else "with its trunk: give no transformer"
            raise ValueError(f"transformer: {folder} was saved {hint}")
        if transformer is not None:
            model = cls.from_transformer(transformer, int(config["num_blocks"]), num_heads, copy=False)
            where = model.query_attention.queries.device
        else:
            trunk = files.empty_trunk(config["trunk"])
            model, where = cls(trunk, trunk.dim, num_heads), torch.device("cpu")
        files.load(model, {folder / files.WEIGHTS: files.read_tensors(folder / files.WEIGHTS)}, "")
        files.restore_tables(model, config["table_dtypes"])
        return model.to(where)

    @classmethod
    def from_published(
        cls,
        *,
        backbone: str | Path,
        query_attention: str | Path,
        mlp: str | Path,
        allow_pickle: bool = False,
        num_heads: int = 8,
        attention_head_dim: int = 128,
    ) -> LatentRewardModel:
        """Read the files that PRFL publishes, in the dtypes they have, on the CPU.

        Args:
            backbone: folder with ``diffusion_pytorch_model*.safetensors``, or one such file, under the names of the
                original Wan code, without the head. Depth and sizes are read from it.
            query_attention: ``query_attention_step_N.ckpt``.
            mlp: ``mlp_step_N.ckpt``.
            allow_pickle: the two ``.ckpt`` files are pickles; they are read only when this is true, and then by
                ``torch.load(weights_only=True)``. ``.safetensors`` files need no permission.
            num_heads: of the pooling; no file tells it.
            attention_head_dim: of the backbone; no file tells it, and it is 128 in every published Wan.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a pickle without permission; missing, unexpected or misshapen tensors, with the file's name.
        """
        head = {
            "query_attention": published.read_head(Path(query_attention), "query_attention", allow_pickle),
            "mlp": published.read_head(Path(mlp), "mlp", allow_pickle),
        }
        tensors, where = published.read_backbone(Path(backbone))
        trunk = files.empty_trunk(published.config_of(tensors, attention_head_dim, where))
        files.load(trunk, {where: published.renamed(tensors, where)}, "body.")
        model = cls(trunk, trunk.dim, num_heads)
        files.load(model.query_attention, {Path(query_attention): head["query_attention"]}, "")
        files.load(model.mlp, {Path(mlp): head["mlp"]}, "")
        return model

    def _place_head(self) -> LatentRewardModel:
        """Put the head where the trunk is."""
        tensors = [parameter for parameter in self.trunk.parameters() if parameter.is_floating_point()]
        wide = any(tensor.dtype == torch.float64 for tensor in tensors)
        for head in (self.query_attention, self.mlp):
            head.to(device=tensors[0].device, dtype=torch.float64 if wide else torch.float32)
        return self

    @contextmanager
    def _constant_trunk(self) -> Iterator[None]:
        """The shared blocks record no gradient for their parameters in here."""
        trained = [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]
        if trained and torch.is_grad_enabled():
            if any(type(parameter).__name__ == "DTensor" for parameter in trained):
                raise ValueError("transformer: sharded and trained: a shared trunk can't be constant; use copy=True")
            if getattr(self._transformer, "gradient_checkpointing", False):
                raise ValueError(
                    "transformer: gradient checkpointing would run the shared blocks again where their parameters are "
                    "trained; use copy=True, or switch it off around the reward"
                )
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
