"""Attention kernels of other packages, against stand-ins with the signatures of their sources.

The stand-ins take every argument by the place or name that the real function has and refuse any other; they compute
with the reference, so that a swapped argument gives other numbers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from prfl_fast.ops.attention import choice
from prfl_fast.ops.attention.peers import FlashAttention2, FlashAttention3, FlashAttention4, Xformers, _Peer
from prfl_fast.ops.attention.provider import Problem
from prfl_fast.ops.attention.reference import Reference

REFERENCE = Reference()
CALLS: list[Any] = []  # what the stand-ins were told beside tensors


def write(targets: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> None:
    for target, gradient in zip(targets, gradients, strict=True):
        assert target is not None
        target.copy_(gradient)


# flash-attn 2.7 and 2.8: flash_attn/flash_attn_interface.py
def fa2_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes, return_softmax) == (0.0, None, False)
    return *REFERENCE.forward(q, k, v, softmax_scale), torch.empty(0), torch.empty(2)


def fa2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes, rng_state) == (0.0, None, None)
    CALLS.append(deterministic)
    write((dq, dk, dv), REFERENCE.backward(dout, q, k, v, out, softmax_lse, softmax_scale, None, deterministic))
    return torch.empty(0)


# FlashAttention 3: hopper/flash_attn_interface.py
def fa3_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Any = None, v_new: Any = None, qv: Any = None, out_: Any = None,
    cu_seqlens_q: Any = None, cu_seqlens_k: Any = None, cu_seqlens_k_new: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, max_seqlen_q: Any = None, max_seqlen_k: Any = None, page_table: Any = None,
    kv_batch_idx: Any = None, leftpad_k: Any = None, rotary_cos: Any = None, rotary_sin: Any = None,
    seqlens_rotary: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
    attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True, scheduler_metadata: Any = None,
    num_splits: int = 1, pack_gqa: Any = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert softmax_scale is not None and k_new is None and not causal
    return *REFERENCE.forward(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)


def fa3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None, sequed_q: Any = None, sequed_k: Any = None, max_seqlen_q: Any = None,
    max_seqlen_k: Any = None, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    softmax_scale: float | None = None, is_causal: bool = False, window_size_left: int = -1,
    window_size_right: int = -1, softcap: float = 0.0, deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    assert softmax_scale is not None and cu_seqlens_q is None and not is_causal
    CALLS.append(deterministic)
    write((dq, dk, dv), REFERENCE.backward(dout, q, k, v, out, softmax_lse, softmax_scale, None, deterministic))
    return torch.empty(0)


# FlashAttention 4: flash_attn/cute/interface.py, without what stands behind the arguments that are used.
def fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, qv: Any = None, *, softmax_scale: float | None = None, causal: bool = False,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None, Any, Any]:  # fmt: skip
    assert softmax_scale is not None and not causal and qv is None
    out, lse = REFERENCE.forward(q, k, v, softmax_scale)
    return out, lse if return_lse else None, None, None


def fa4_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: float | None = None,
    causal: bool = False, *, deterministic: bool = False, dlse: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert softmax_scale is not None and not causal
    CALLS.append(deterministic)
    return REFERENCE.backward(dout, q, k, v, out, lse, softmax_scale, dlse, deterministic)


def fa4_backward_before_dlse(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, softmax_scale: float | None = None,
    *, deterministic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    return fa4_backward(q, k, v, out, dout, lse, softmax_scale, deterministic=deterministic)


# xformers: xformers/ops/fmha/__init__.py
def xformers_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None,
    *, op: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert scale is not None and attn_bias is None and p == 0.0
    out, lse = REFERENCE.forward(query, key, value, scale)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))


def xformers_backward(
    grad: Tensor, output: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None,
    p: float = 0.0, scale: float | None = None, *, op: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert scale is not None and attn_bias is None and p == 0.0
    return REFERENCE.backward(grad, query, key, value, output, lse, scale, None, False)


STAND_INS: dict[type[_Peer], dict[str, Any]] = {
    FlashAttention2: {"_flash_attn_forward": fa2_forward, "_flash_attn_backward": fa2_backward},
    FlashAttention3: {"_flash_attn_forward": fa3_forward, "_flash_attn_backward": fa3_backward},
    FlashAttention4: {"_flash_attn_fwd": fa4_forward, "_flash_attn_bwd": fa4_backward},
    Xformers: {
        "memory_efficient_attention_forward_requires_grad": xformers_forward,
        "memory_efficient_attention_backward": xformers_backward,
    },
}
VERSIONS = {"flash-attn": "2.8.3", "flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0b5", "xformers": "0.0.33"}


def install(kind: type[_Peer], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> _Peer:
    """A fresh provider over a package of stand-ins."""
    for name in {kind.module.partition(".")[0], *kind.needs}:
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    parts = kind.module.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
    for name, function in (STAND_INS[kind] | changes).items():
        setattr(sys.modules[kind.module], name, function)
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: VERSIONS.get(name) or real(name))
    CALLS.clear()
    return kind()


def on_a_gpu(**changes: Any) -> Problem:
    sizes = {"batch": 2, "queries": 40, "keys": 70, "heads": 3, "head_dim": 64, "deterministic": False}
    return Problem(**{"device": torch.device("cuda", 0), "dtype": torch.bfloat16, **sizes, **changes})


def inputs() -> list[Tensor]:
    packed = torch.randn(2, 9, 3, 2, 16)
    q, k, v = packed.unbind(2)
    return [q, k[:, :7], v[:, :7], torch.randn(2, 9, 2, 16)]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", STAND_INS, ids=lambda kind: kind.name)
def test_arguments_and_log_sum_exp(kind: type[_Peer], deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = install(kind, monkeypatch)
    q, k, v, d_out = inputs()
    out, lse = peer.forward(q, k, v, 0.3)
    right, right_lse = REFERENCE.forward(q, k, v, 0.3)
    assert torch.equal(out, right) and torch.equal(lse, right_lse)
    made = peer.backward(d_out, q, k, v, right, right_lse, 0.3, None, deterministic)
    exact = REFERENCE.backward(d_out, q, k, v, right, right_lse, 0.3, None, deterministic)
    assert all(map(torch.equal, made, exact))
    assert CALLS == ([deterministic] if kind is not Xformers else [])


@pytest.mark.parametrize("kind", STAND_INS, ids=lambda kind: kind.name)
def test_absent_and_present(kind: type[_Peer], monkeypatch: pytest.MonkeyPatch) -> None:
    absent = kind()
    if importlib.util.find_spec(kind.module.partition(".")[0]) is None:
        assert absent.missing() == f"{kind.distributions[0]} is not installed"
        assert choice.PROVIDERS[kind.name].missing() and not absent.takes_d_lse
    peer = install(kind, monkeypatch)
    assert peer.missing() is None
    assert peer.version() == VERSIONS[kind.distributions[0]]


def test_the_second_version_alone_is_not_the_fourth(monkeypatch: pytest.MonkeyPatch) -> None:
    install(FlashAttention4, monkeypatch)
    monkeypatch.delitem(VERSIONS, "flash-attn-4")
    assert FlashAttention4().missing() == "flash-attn-4 is not installed"
    assert FlashAttention2().missing() == "flash-attn is not installed"  # its compiled half is not there


def test_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = install(FlashAttention2, monkeypatch)
    monkeypatch.setitem(VERSIONS, "flash-attn", "2.6.3")
    assert peer.missing() == "flash-attn 2.6.3 is too old, 2.7 is needed"


def test_the_fourth_takes_a_gradient_of_the_log_sum_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, d_out = inputs()
    out, lse = REFERENCE.forward(q, k, v, 0.3)
    d_lse = torch.randn(2, 9, 2).transpose(1, 2)
    peer = install(FlashAttention4, monkeypatch)
    assert peer.takes_d_lse
    made = peer.backward(d_out, q, k, v, out, lse, 0.3, d_lse, False)
    assert all(map(torch.equal, made, REFERENCE.backward(d_out, q, k, v, out, lse, 0.3, d_lse, False)))
    assert not install(FlashAttention4, monkeypatch, _flash_attn_bwd=fa4_backward_before_dlse).takes_d_lse
    assert not any(install(kind, monkeypatch).takes_d_lse for kind in (FlashAttention2, FlashAttention3, Xformers))


@pytest.mark.parametrize(
    ("kind", "capability", "changes", "reason"),
    [
        (FlashAttention2, (8, 0), {}, None),
        (FlashAttention2, (7, 5), {}, "not for compute capability (7, 5)"),
        (FlashAttention3, (9, 0), {}, None),
        (FlashAttention3, (8, 0), {}, "not for compute capability (8, 0)"),
        (FlashAttention3, (10, 0), {}, "not for compute capability (10, 0)"),
        (FlashAttention4, (10, 0), {}, None),
        (FlashAttention4, (8, 0), {}, "not for compute capability (8, 0)"),
        (FlashAttention4, (9, 0), {"head_dim": 256}, "head dimension 256 is no multiple of 8 up to 128"),
        (Xformers, (9, 0), {}, None),
        (Xformers, (9, 0), {"deterministic": True}, "its backward adds with atomics"),
        (FlashAttention2, (9, 0), {"deterministic": True}, None),
        (FlashAttention2, (9, 0), {"head_dim": 20}, "head dimension 20 is no multiple of 8 up to 256"),
        (FlashAttention2, (9, 0), {"dtype": torch.float32}, "not for torch.float32"),
        (FlashAttention2, (9, 0), {"device": torch.device("cpu")}, "for CUDA tensors"),
        (FlashAttention2, (9, 0), {"queries": 0}, "no tokens"),
    ],
    ids=str,
)
def test_what_they_run(
    kind: type[_Peer], capability: tuple[int, int], changes: dict[str, Any], reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert kind().why_not(on_a_gpu(**changes), backward=True) == reason
    if changes.get("deterministic"):
        assert kind().why_not(on_a_gpu(**changes), backward=False) is None
