"""Bytes that one block keeps for its backward, diffusers' own and fused, at production sizes; no memory is needed.

    python benchmarks/fused_kept_bytes.py [--output benchmarks/results/fused_kept_bytes.json]

Blocks are built of fake tensors in bfloat16 (with the float32 parts that ``from_pretrained`` keeps) and run forward
once; what autograd saves is counted by its storages, each once, without the parameters. One unit is the token stream.
Rows named "lora" train rank-32 adapters alone, as peft lays them out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import prfl_fast
from prfl_fast.benchmarks import record

Case = tuple[nn.Module, tuple[Any, ...], int]


def kept_bytes(block: nn.Module, arguments: tuple[Any, ...]) -> int:
    """Storages that the block's graph saves, parameters apart."""
    own = {p.untyped_storage()._cdata for p in block.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in own:
            seen[key] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(*arguments)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.empty(*shape, dtype=dtype, requires_grad=grad)


def wan(
    length: int, width: int, ffn: int, heads: int, image: bool = False, per_token: bool = False, vace: bool = False
) -> Case:
    from diffusers.models.transformers import transformer_wan, transformer_wan_vace

    cls: Any = transformer_wan_vace.WanVACETransformerBlock if vace else transformer_wan.WanTransformerBlock
    block = cls(width, ffn, heads, "rms_norm_across_heads", True, 1e-6, width if image else None)
    block.scale_shift_table = nn.Parameter(_empty(1, 6, width, dtype=torch.float32))
    for name in ("weight", "bias"):
        setattr(block.norm2, name, nn.Parameter(_empty(width, dtype=torch.float32)))
    text = _empty(1, 512 + (257 if image else 0), width)
    rows = (1, length, 6, width) if per_token else (1, 6, width)
    tables = tuple(_empty(1, length, 1, width // heads, dtype=torch.float32, grad=False) for _ in range(2))
    streams = [_empty(1, length, width), text] + ([_empty(1, length, width)] if vace else [])
    return block, (*streams, _empty(*rows), tables), length * width * 2


def hunyuan(length: int, single: bool, replaced: bool = False) -> Case:
    from diffusers.models.transformers import transformer_hunyuan_video as module

    name = f"HunyuanVideo{'TokenReplace' if replaced else ''}{'Single' if single else ''}TransformerBlock"
    block = getattr(module, name)(24, 128, mlp_ratio=4.0)
    tables = tuple(_empty(length, 128, dtype=torch.float32, grad=False) for _ in range(2))
    extra = (_empty(1, 3072), 3600) if replaced else ()
    streams = (_empty(1, length, 3072), _empty(1, 256, 3072), _empty(1, 3072))
    return block, (*streams, None, tables, *extra), (length + 256) * 3072 * 2


def ltx(length: int) -> Case:
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock

    block = LTXVideoTransformerBlock(2048, 32, 64, 2048)
    tables = tuple(_empty(1, length, 2048, dtype=torch.float32, grad=False) for _ in range(2))
    arguments = (_empty(1, length, 2048), _empty(1, 128, 2048), _empty(1, 1, 6 * 2048), tables, None)
    return block, arguments, length * 2048 * 2


def cogvideox(length: int, rotary: bool) -> Case:
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock

    heads = 48 if rotary else 30
    block = CogVideoXBlock(heads * 64, heads, 64, 512, attention_bias=True)
    tables = tuple(_empty(length, 64, dtype=torch.float32, grad=False) for _ in range(2)) if rotary else None
    arguments = (_empty(1, length, heads * 64), _empty(1, 226, heads * 64), _empty(1, 512), tables)
    return block, arguments, (length + 226) * heads * 64 * 2


CASES: dict[str, Callable[[], Case]] = {
    "wan 14B, 480p": lambda: wan(32760, 5120, 13824, 40),
    "wan 14B, 720p": lambda: wan(75600, 5120, 13824, 40),
    "wan 1.3B, 480p": lambda: wan(32760, 1536, 8960, 12),
    "wan 14B image to video, 480p": lambda: wan(32760, 5120, 13824, 40, image=True),
    "wan 5B, timestep per token, 720p": lambda: wan(27280, 3072, 14336, 24, per_token=True),
    "wan VACE 14B control block, 480p": lambda: wan(32760, 5120, 13824, 40, vace=True),
    "hunyuan two streams, 720p": lambda: hunyuan(118800, single=False),
    "hunyuan one stream, 720p": lambda: hunyuan(118800, single=True),
    "hunyuan two streams, first frame replaced": lambda: hunyuan(118800, single=False, replaced=True),
    "hunyuan one stream, first frame replaced": lambda: hunyuan(118800, single=True, replaced=True),
    "ltx 2B, 704p": lambda: ltx(7392),
    "cogvideox 2B, 480p": lambda: cogvideox(17550, rotary=False),
    "cogvideox 5B, 480p": lambda: cogvideox(17550, rotary=True),
}


def _with_lora(block: nn.Module) -> None:
    """Adapters on the attentions' projections; nothing else is trained."""
    from peft import LoraConfig, inject_adapter_in_model

    block.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    # Fake weights can't be moved; they are where and what they should be: float32, as peft makes them.
    with patch.object(nn.Module, "_apply", lambda module, *_, **__: module):
        inject_adapter_in_model(LoraConfig(r=32, target_modules=targets), block)


def measure(case: Callable[[], Case], lora: bool = False) -> dict[str, float]:
    """Units that an eager and a fused block keep."""
    units = []
    for fused in (False, True):
        with FakeTensorMode():
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                block, arguments, unit = case()
            finally:
                torch.set_default_dtype(before)
            if lora:
                _with_lora(block)
                # Modulation and text come from frozen embedders.
                stream, *rest = arguments
                arguments = (stream, *(t.detach() if isinstance(t, Tensor) else t for t in rest))
            if fused:
                prfl_fast.fuse(block)
            units.append(kept_bytes(block, arguments) / unit)
    eager, ours = units
    return {"eager": round(eager, 2), "fused": round(ours, 2), "share": round(ours / eager, 3)}


def table() -> dict[str, dict[str, float]]:
    rows = {name: measure(case) for name, case in CASES.items()}
    for name in ("wan 14B, 480p", "hunyuan one stream, 720p", "ltx 2B, 704p", "cogvideox 5B, 480p"):
        rows[f"{name}, lora"] = measure(CASES[name], lora=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the JSON to this file, too")
    arguments = parser.parse_args()
    rows = table()
    for name, row in rows.items():
        print(f"{name:45} {row['eager']:6.2f} {row['fused']:6.2f} {100 * row['share']:5.1f} %")
    if arguments.output is not None:
        about = record.about(torch.device("cpu"))
        content = {"about": about, "unit": "bytes of the token stream in bfloat16", "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
