"""Keep-sets: which outputs of a checkpointed block stay from its forward to its backward instead of being recomputed.

A keep-set is written as ``"all"`` (the block is no checkpoint), ``"nothing"`` (it keeps its inputs), or as a union of
:data:`LABELS` joined by ``+``, as in ``"attention+feed_forward"``. An operation belongs to a label by its own name
(attention, norms) or by the name of the parameter that it multiplies (projections), so that fused and plain blocks are
covered by the same words, and what is kept depends on the block alone.

A recomputation runs every operation of the block that is not kept, so a kept output always saves exactly its own
operation: every union is closed under the operations' dependencies.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cache
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from prfl_fast.memory.trace import tensors_in

ALL, NOTHING = "all", "nothing"

# attention: output and log-sum-exp; qk: normed, rotated queries and keys; qkv: the projections into attention, packed
# or not; feed_forward: the pre-activation; output: every other product, out of attention and feed-forward; norms: the
# normed tensors with their statistics.
LABELS = ("attention", "qk", "qkv", "feed_forward", "output", "norms")

_BY_NAME = {
    "prfl_fast::attention": "attention",
    "prfl_fast::qk_norm_rope": "qk",
    "prfl_fast::modulated_norm": "norms",
    "prfl_fast::gated_residual_norm": "norms",
    "aten::native_layer_norm": "norms",
    "aten::_fused_rms_norm": "norms",
    "aten::native_group_norm": "norms",
}
_ATTENTION = re.compile(r"aten::_scaled_dot_product_\w*attention\w*")
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::convolution"}

# Parameters' names, adapters and wrappers in between included.
_QKV = re.compile(r"(^|\.)(to_(q|k|v|qkv|kv|added_qkv|added_kv|query|key|value)|(add_)?[qkv]_proj|qkv|q|k|v)\.")
_FEED_FORWARD = re.compile(r"(^|\.)(net\.0(\.proj)?|fc1|linear_1|proj_mlp|in_layer|up_proj|gate_proj|w1|w3)\.")
# An adapter's own products are small: they run again.
_SMALL = re.compile(r"(^|\.)(lora_|norm\w*\.linear|time_|modulation)")


def unions(labels: Collection[str]) -> list[str]:
    """Names of all keep-sets made of some of these labels, ``"nothing"`` first."""
    present = [label for label in LABELS if label in labels]
    return ["+".join(some) or NOTHING for n in range(len(present) + 1) for some in combinations(present, n)]


@cache
def parse_keep(keep: str) -> frozenset[str] | None:
    """Labels of a keep-set's name; None for ``"all"``.

    Raises:
        ValueError: a word that is no label.
    """
    if keep == ALL:
        return None
    words = [] if keep == NOTHING else keep.split("+")
    unknown = [word for word in words if word not in LABELS]
    if unknown or len(set(words)) != len(words):
        raise ValueError(
            f"keep: expected {ALL!r}, {NOTHING!r}, or some of {', '.join(LABELS)} joined by '+', each once, "
            f"got {keep!r}"
        )
    return frozenset(words)


def label_of_parameter(name: str) -> str | None:
    """Label of the products with a block's parameter; None: they always run again."""
    if _SMALL.search(name):
        return None
    if _QKV.search(name):
        return "qkv"
    return "feed_forward" if _FEED_FORWARD.search(name) else "output"


@cache
def _label_of_name(name: str) -> str | None:
    return "attention" if _ATTENTION.fullmatch(name) and "backward" not in name else _BY_NAME.get(name)


class Labels:
    """Labels of the operations of one run of a block.

    Weights are recognised by their storage, casts and packings of them too: what is computed of weights alone counts as
    the first of them.
    """

    def __init__(self, block: nn.Module) -> None:
        self._weights: dict[int, str | None] = {
            _key(p): label_of_parameter(name) for name, p in block.named_parameters() if _strided(p)
        }
        self._derived: list[Tensor] = []  # held, so that no other storage takes their place meanwhile

    def of(self, func: Any, args: Any, kwargs: Any) -> str | None:
        """The label of an operation."""
        name = _name(func)
        label = _label_of_name(name)
        if label is not None or name not in _PRODUCTS:
            return label
        given = [t for t in tensors_in((args, kwargs)) if _strided(t)]
        known = [_key(t) for t in given if _key(t) in self._weights]
        # A bias comes first, its weight last: both belong to one module.
        return self._weights[known[-1]] if known and len(known) < len(given) else None

    def see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Notes what an operation that has no label has made of weights alone."""
        if _name(func) in _PRODUCTS:
            return
        given = [t for t in tensors_in((args, kwargs)) if _strided(t)]
        if not given or not all(_key(t) in self._weights for t in given):
            return
        for tensor in tensors_in(result):
            if _strided(tensor) and _key(tensor) not in self._weights:
                self._weights[_key(tensor)] = self._weights[_key(given[0])]
                self._derived.append(tensor)


@cache
def _name(func: Any) -> str:
    return str(func.name()).partition(".")[0]


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that an operation writes into."""
    declared = func._schema.arguments
    given = [*zip(declared, args, strict=False), *((a, kwargs[a.name]) for a in declared if a.name in kwargs)]
    return [t for a, value in given if a.alias_info is not None and a.alias_info.is_write for t in tensors_in(value)]


def _strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and type(tensor).__name__ != "DTensor"


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
