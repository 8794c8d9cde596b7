"""Fused blocks compute what diffusers' blocks compute: outputs, every gradient, in float64 and bfloat16."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from fusecases import NAMES, SHORT, Case, distance, make_case, no_islands
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import prfl_fast

pytestmark = pytest.mark.filterwarnings("ignore:Casting complex values")


class Calls(TorchDispatchMode):
    """Names of this package's ops that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prfl_fast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_float64_is_the_plain_mathematics(name: str, lora: bool) -> None:
    """1e-10: float64 rounds at 1e-16, and two blocks forward and backward are some thousand roundings in a row."""
    case = make_case(name, lora=lora)
    with no_islands():
        expected = case.results()
    prfl_fast.fuse(case.net)
    with no_islands(), Calls() as calls:
        found = case.results()
    assert distance(found, expected) < 1e-10
    assert {"modulated_norm", "qk_norm_rope", "attention", "row_backward", "attention_backward"} <= set(calls.names)
    # Every attention of every block is ours.
    from prfl_fast.models.fused.door import is_fused

    attentions = [m for b in case.net.modules() if is_fused(b) for m in b.modules() if hasattr(m, "to_q")]
    images = sum(getattr(m, "add_k_proj", None) is not None and "wan" in name for m in attentions)
    apart = "hunyuan" in name or "cogvideox" in name  # video and text of the last block
    assert calls.names.count("attention") == len(attentions) + images + apart


@pytest.mark.parametrize("name", SHORT)
def test_the_unfused_module_is_within_its_own_float32_islands(name: str) -> None:
    """A block rounds to float32 in at most 3 islands of 8 operations (norm, modulation, gate, rotation), forward and
    backward, 2 blocks: 96 roundings of 2^-24, each of a tensor as large as the compared one at most 16 times over."""
    case = make_case(name)
    expected = case.results()
    prfl_fast.fuse(case.net)
    assert distance(case.results(), expected) < 96 * 16 * 2**-24


def _errors(case: Case, exact: list[Tensor | None]) -> tuple[float, float]:
    """Of the prediction and of all gradients together, relative."""

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())

    found = case.results()
    pairs = [(f.double(), e.double()) for f, e in zip(found, exact, strict=True) if f is not None and e is not None]
    (out, out_exact), *rest = pairs
    return norm([out - out_exact]) / norm([out_exact]), norm([f - e for f, e in rest]) / norm([e for _, e in rest])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SHORT)
def test_bfloat16_is_no_further_from_float64_than_the_unfused_module(name: str, lora: bool) -> None:
    """At most 1.2 times, over three networks together: one network's errors are a draw of few roundings."""
    eager, fused = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for seed in range(3):
        case = make_case(name, torch.bfloat16, seed=seed, lora=lora)
        exact = _in_float64(name, case, seed, lora)
        eager += torch.tensor(_errors(case, exact), dtype=torch.float64).square()
        prfl_fast.fuse(case.net)
        fused += torch.tensor(_errors(case, exact), dtype=torch.float64).square()
    assert (fused.sqrt() <= 1.2 * eager.sqrt()).all(), (fused.sqrt(), eager.sqrt())


def _in_float64(name: str, case: Case, seed: int, lora: bool) -> list[Tensor | None]:
    wide = make_case(name, seed=seed, lora=lora)
    with torch.no_grad():
        for ours, theirs in zip(wide.net.parameters(), case.net.parameters(), strict=True):
            ours.copy_(theirs)
        for ours, theirs in zip(wide.inputs, case.inputs, strict=True):
            ours.copy_(theirs)
    with no_islands():
        return wide.results()


@pytest.mark.parametrize("crop", [(1, 2, 2), (1, 2, 6), (2, 2, 6)], ids=["1", "3", "6"])
@pytest.mark.parametrize("name", ["wan", "wan-per-token", "hunyuan-replace"])
def test_few_tokens_and_one_sample(name: str, crop: tuple[int, int, int]) -> None:
    case = make_case(name, batch=1, crop=crop)
    with no_islands():
        expected = case.results()
        prfl_fast.fuse(case.net)
        assert distance(case.results(), expected) < 1e-10


def test_copies_and_pickles_are_fused_and_have_weights_of_their_own() -> None:
    case = make_case("wan")
    before = case.results()
    prfl_fast.fuse(case.net)
    fused = case.results()
    assert not torch.equal(before[0], fused[0])  # it rounds elsewhere
    for made in (copy.deepcopy(case.net), pickle.loads(pickle.dumps(case.net))):
        with torch.no_grad():
            for parameter in case.net.parameters():
                parameter.mul_(1.5)
        own = Case(made, case.inputs, case.call)
        assert all(f is None or torch.equal(f, o) for f, o in zip(fused, own.results(), strict=True))
        with torch.no_grad():
            for parameter in case.net.parameters():
                parameter.div_(1.5)
        assert torch.equal(own.run(), fused[0])
        prfl_fast.unfuse(made)
        assert torch.equal(own.run(), before[0])
