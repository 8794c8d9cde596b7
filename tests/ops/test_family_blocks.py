"""The row ops and qk_norm_rope against what they replace, taken out of running blocks of the four families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tinyfamilies import make, overrides, plain_call
from torch import Tensor, nn

from prfl_fast.ops import gated_residual, gated_residual_norm, modulated_norm, qk_norm_rope


class Seen:
    """Arguments and result of every named submodule of a block, and what reached attention, in one network call."""

    def __init__(self, name: str, find: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        twin = make(name)
        self.net: Any = twin.net
        self.block: Any = find(self.net)
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any], Any]] = {}
        self.attended: list[tuple[Tensor, Tensor]] = []
        modules = {"": self.block, **dict(self.block.named_modules())}
        inside = []
        for key, module in modules.items():
            module.register_forward_hook(self._note(key), with_kwargs=True)
        self.block.register_forward_pre_hook(lambda *_: inside.append(True))
        self.block.register_forward_hook(lambda *_: inside.clear())
        attend = nn.functional.scaled_dot_product_attention

        def watch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if inside:
                self.attended.append((query.transpose(1, 2), key.transpose(1, 2)))
            return attend(query, key, value, *args, **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watch)
        t = twin.scheduler.timesteps[0]
        shown = (overrides(twin, twin.latents, t) or {}).get("hidden_states")
        with torch.no_grad():
            plain_call(twin.net, twin.latents, t, twin.conditioning, shown)

    def _note(self, key: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.calls.setdefault(key, (args, kwargs, output))

        return hook

    def out(self, key: str) -> Any:
        return self.calls[key][2]

    def given(self, key: str, index: int, name: str) -> Any:
        args, kwargs, _ = self.calls[key]
        return args[index] if index < len(args) else kwargs[name]


def same(actual: Tensor, expected: Tensor) -> None:
    """Both in float32 with some tens of roundings each, 100 of the largest number apart."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype == torch.float32
    bound = 100 * torch.finfo(torch.float32).eps * max(1.0, float(expected.abs().max()))
    assert float((actual - expected).detach().abs().max()) <= bound
    assert float(expected.abs().max()) > 0.1  # not all of it zero


def heads(x: Tensor, attention: Any) -> Tensor:
    return x.unflatten(2, (attention.heads, -1))


@pytest.mark.parametrize("per_token", [False, True])
def test_wan(per_token: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen("wan", lambda net: net.blocks[1], monkeypatch)
    block = seen.block
    x, text, temb, rotary = seen.calls[""][0]
    if per_token:
        # Wan 2.2 5B: every token has its timestep.
        temb = temb.unsqueeze(1) + torch.randn(x.shape[0], x.shape[1], 6, x.shape[2])
        seen.calls.clear()
        seen.attended.clear()
        with torch.no_grad():
            block(x, text, temb, rotary)
    table = block.scale_shift_table if temb.ndim == 3 else block.scale_shift_table.unsqueeze(0)
    shift, scale, gate, c_shift, c_scale, c_gate = (table + temb).unbind(-2)
    same(modulated_norm(x, scale, shift, eps=block.norm1.eps), seen.given("attn1", 0, "hidden_states"))
    own = {"weight": block.norm2.weight, "bias": block.norm2.bias, "eps": block.norm2.eps}
    stream, normed = gated_residual_norm(x, seen.out("attn1"), gate, **own)
    same(normed, seen.given("attn2", 0, "hidden_states"))
    stream, normed = gated_residual_norm(stream, seen.out("attn2"), None, c_scale, c_shift, eps=block.norm3.eps)
    same(normed, seen.given("ffn", 0, "hidden_states"))
    same(gated_residual(stream, seen.out("ffn"), c_gate), seen.out(""))

    cos, sin = rotary[0][..., 0::2], rotary[1][..., 1::2]
    for attention, angles, (q, k) in zip(
        ("attn1", "attn2"), ({"cos": cos, "sin": sin}, {}), seen.attended, strict=True
    ):
        module = getattr(block, attention)
        raw = [heads(seen.out(f"{attention}.{name}"), module) for name in ("to_q", "to_k")]
        ours = qk_norm_rope(*raw, module.norm_q.weight, module.norm_k.weight, **angles, eps=module.norm_q.eps)
        same(ours[0], q)
        same(ours[1], k)


@pytest.mark.parametrize("stream", ["", "_context"])
@pytest.mark.parametrize("name", ["hunyuan", "hunyuan-replace"])
def test_hunyuan_double_block(name: str, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(name, lambda net: net.transformer_blocks[0], monkeypatch)
    norm = getattr(seen.block, f"norm1{stream}")
    args, kwargs, outputs = seen.calls[f"norm1{stream}"]
    x = args[0]
    mods = [norm.linear(norm.silu(kwargs["emb"])) if "emb" in kwargs else norm.linear(norm.silu(args[1]))]
    segments = None
    if name == "hunyuan-replace" and not stream:
        first, tokens = args[2:] if len(args) > 2 else (kwargs["token_replace_emb"], kwargs["first_frame_num_tokens"])
        mods.insert(0, norm.linear(norm.silu(first)))
        segments = (tokens, x.shape[1] - tokens)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = torch.stack(mods, dim=1).chunk(6, dim=2)
    same(modulated_norm(x, scale, shift, segments=segments, eps=norm.norm.eps), outputs[0])
    branch = seen.out("attn")[1 if stream else 0]
    second = getattr(seen.block, f"norm2{stream}")
    middle, normed = gated_residual_norm(x, branch, gate, scale_mlp, shift_mlp, segments=segments, eps=second.eps)
    same(normed, seen.given(f"ff{stream}", 0, "hidden_states"))
    final = gated_residual(middle, seen.out(f"ff{stream}"), gate_mlp, segments=segments)
    same(final, seen.out("")[1 if stream else 0])


def rotary_of(table: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Tables ``[L, D]`` in which each value stands twice."""
    return {"cos": table[0][None, :, None, 0::2], "sin": table[1][None, :, None, 0::2]}


def test_hunyuan_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    double = Seen("hunyuan", lambda net: net.transformer_blocks[0], monkeypatch)
    attention = double.block.attn
    angles = rotary_of(double.calls["attn"][1]["image_rotary_emb"])
    options: dict[str, Any] = {"eps": attention.norm_q.eps, "across_heads": False}
    video = qk_norm_rope(
        *(heads(double.out(f"attn.{name}"), attention) for name in ("to_q", "to_k")),
        attention.norm_q.weight, attention.norm_k.weight, **angles, **options,
    )  # fmt: skip
    text = qk_norm_rope(
        *(heads(double.out(f"attn.{name}"), attention) for name in ("add_q_proj", "add_k_proj")),
        attention.norm_added_q.weight, attention.norm_added_k.weight, **options,
    )  # fmt: skip
    for ours, theirs in zip(zip(video, text, strict=True), double.attended[0], strict=True):
        same(torch.cat(ours, dim=1), theirs)


def test_hunyuan_single_block(monkeypatch: pytest.MonkeyPatch) -> None:
    single = Seen("hunyuan", lambda net: net.single_transformer_blocks[0], monkeypatch)
    attention = single.block.attn
    table = single.calls["attn"][1]["image_rotary_emb"]
    ours = qk_norm_rope(
        *(heads(single.out(f"attn.{name}"), attention) for name in ("to_q", "to_k")),
        attention.norm_q.weight, attention.norm_k.weight, **rotary_of(table), eps=attention.norm_q.eps,
        across_heads=False, rope_tokens=(0, table[0].shape[0]),
    )  # fmt: skip
    for mine, theirs in zip(ours, single.attended[0], strict=True):
        same(mine, theirs)


def test_ltx(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen("ltx", lambda net: net.transformer_blocks[1], monkeypatch)
    block = seen.block
    x, temb, rotary = (
        seen.given("", index, name) for index, name in ((0, "hidden_states"), (2, "temb"), (3, "image_rotary_emb"))
    )
    values = block.scale_shift_table + temb.unflatten(2, (6, -1))
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = values.unbind(2)
    kind: dict[str, Any] = {"kind": "rms", "eps": block.norm1.eps}
    same(modulated_norm(x, scale, shift, **kind), seen.given("attn1", 0, "hidden_states"))
    stream = gated_residual(x, seen.out("attn1"), gate)
    same(stream, seen.given("attn2", 0, "hidden_states"))
    stream, normed = gated_residual_norm(stream, seen.out("attn2"), None, scale_mlp, shift_mlp, **kind)
    same(normed, seen.given("ff", 0, "hidden_states"))
    same(gated_residual(stream, seen.out("ff"), gate_mlp), seen.out(""))

    # Tables over the full inner width: every head has its own.
    tables = [heads(table, block.attn1)[..., 0::2] for table in rotary]
    for attention, angles, theirs in zip(
        ("attn1", "attn2"), ({"cos": tables[0], "sin": tables[1]}, {}), seen.attended, strict=True
    ):
        module = getattr(block, attention)
        raw = [heads(seen.out(f"{attention}.{name}"), module) for name in ("to_q", "to_k")]
        ours = qk_norm_rope(*raw, module.norm_q.weight, module.norm_k.weight, **angles, eps=module.norm_q.eps)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox-rotary"])
def test_cogvideox(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(name, lambda net: net.transformer_blocks[1], monkeypatch)
    block = seen.block
    video, text, temb = (seen.given("norm1", index, "") for index in range(3))
    segments = (text.shape[1], video.shape[1])
    x = torch.cat([text, video], dim=1)

    def rows(norm: Any) -> tuple[Tensor, ...]:
        both = norm.linear(norm.silu(temb)).unflatten(1, (2, 3, -1)).flip(1)
        shift, scale, gate = both.unbind(2)
        return shift, scale, gate

    def own(norm: Any) -> dict[str, Any]:
        return {"weight": norm.norm.weight, "bias": norm.norm.bias, "eps": norm.norm.eps, "segments": segments}

    shift, scale, gate = rows(block.norm1)
    made = seen.out("norm1")
    same(modulated_norm(x, scale, shift, **own(block.norm1)), torch.cat([made[1], made[0]], dim=1))
    attended = seen.out("attn1")
    branch = torch.cat([attended[1], attended[0]], dim=1)
    shift, scale, last = rows(block.norm2)
    stream, normed = gated_residual_norm(x, branch, gate, scale, shift, **own(block.norm2))
    same(normed, seen.given("ff", 0, "hidden_states"))
    final = gated_residual(stream, seen.out("ff"), last, segments=segments)
    same(final, torch.cat([seen.out("")[1], seen.out("")[0]], dim=1))

    attention = block.attn1
    table = seen.calls["attn1"][1]["image_rotary_emb"]
    assert (table is not None) == (name == "cogvideox-rotary")
    angles: dict[str, Any] = {} if table is None else {**rotary_of(table), "rope_tokens": (segments[0], sum(segments))}
    ours = qk_norm_rope(
        *(heads(seen.out(f"attn1.{part}"), attention) for part in ("to_q", "to_k")),
        attention.norm_q.weight, attention.norm_k.weight, attention.norm_q.bias, attention.norm_k.bias, **angles,
        eps=attention.norm_q.eps, kind="layer", across_heads=False,
    )  # fmt: skip
    for mine, theirs in zip(ours, seen.attended[0], strict=True):
        same(mine, theirs)
