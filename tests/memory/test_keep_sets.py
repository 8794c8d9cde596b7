"""Keep-sets in the blocks of real families: whatever is kept, the bits are those of the plain call."""

from __future__ import annotations

from typing import Any

import pytest
import tinyfamilies
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prfl_fast.memory.blocks import recompute_blocks
from prfl_fast.memory.keeps import ALL, LABELS, NOTHING, label_of_parameter, parse_keep, unions
from prfl_fast.memory.selective import CallMemory
from prfl_fast.models import adapter_for

KEEPS = (ALL, NOTHING, *LABELS, "+".join(LABELS))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept call", "recomputed call"])
@pytest.mark.parametrize("name", tinyfamilies.TEXT)
def test_every_keep_set_gives_the_same_bits(name: str, recomputed: bool) -> None:
    """In two backwards too; blocks keep unlike things. CogVideoX writes into its normed queries."""
    pytest.importorskip("diffusers")
    twin = tinyfamilies.make(name)
    net: Any = twin.net
    blocks = [block for _, block in adapter_for(net).blocks()]
    x = twin.latents.clone().requires_grad_()
    leaves = [x, *net.parameters()]

    def call(given: Tensor) -> Tensor:
        return twin.call(given, torch.tensor(371.0), twin.conditioning)

    def gradients(output: Tensor, retain: bool) -> list[Tensor | None]:
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        return list(torch.autograd.grad((output * weights).sum(), leaves, allow_unused=True, retain_graph=retain))

    expected = gradients(call(x), False)
    for first, keep in enumerate(KEEPS):
        keeps = {id(b): keep if k % 2 == 0 else KEEPS[(first + 3) % len(KEEPS)] for k, b in enumerate(blocks)}
        memory = CallMemory(keeps, recomputed)

        def planned(given: Tensor, memory: CallMemory = memory) -> Tensor:
            with recompute_blocks(net, blocks, memory):
                return call(given)

        output: Any = checkpoint(planned, x, use_reentrant=False) if recomputed else planned(x)
        for retain in (True, False):
            tinyfamilies.assert_equal(gradients(output, retain), expected)


def test_names() -> None:
    assert parse_keep(ALL) is None and parse_keep(NOTHING) == frozenset()
    assert parse_keep("attention+qkv") == {"attention", "qkv"}
    assert unions(("norms", "attention")) == [NOTHING, "attention", "norms", "attention+norms"]
    for wrong in ("", "attention+attention", "query", "all+qkv"):
        with pytest.raises(ValueError, match="keep: expected"):
            parse_keep(wrong)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("attn1.to_q.weight", "qkv"),
        ("attn1.to_q.base_layer.weight", "qkv"),
        ("attn1.to_q.lora_A.default.weight", None),
        ("attn.add_k_proj.bias", "qkv"),
        ("attn1.to_qkv.weight", "qkv"),
        ("ffn.net.0.proj.weight", "feed_forward"),
        ("proj_mlp.weight", "feed_forward"),
        ("ffn.net.2.weight", "output"),
        ("attn1.to_out.0.weight", "output"),
        ("norm1.linear.weight", None),
    ],
)
def test_labels_of_parameters(name: str, label: str | None) -> None:
    assert label_of_parameter(name) == label
