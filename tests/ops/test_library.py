"""The loader of the compiled ops: what it announces, and which cards a build covers."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from prfl_fast.ops import library
from prfl_fast.ops.library import CompiledOps, load


@pytest.mark.parametrize(
    ("archs", "covered", "not_covered"),
    [
        (("sm_80", "sm_90a", "sm_100", "compute_100"), [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        (("sm_90a",), [(9, 0)], [(8, 0), (10, 0), (9, 1)]),
        (("sm_100f",), [(10, 0), (10, 3)], [(12, 0), (9, 0)]),
        ((), [], [(9, 0)]),
    ],
)
def test_which_cards_a_build_covers(
    archs: tuple[str, ...], covered: list[tuple[int, int]], not_covered: list[tuple[int, int]]
) -> None:
    ops = CompiledOps("13.0", archs, "")
    assert all(ops.covers(*card) for card in covered)
    assert not any(ops.covers(*card) for card in not_covered)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_a_gpu_without_cuda_kernels_is_announced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path / "not-there.so") is None  # no GPU: nothing is lost
    pretend_gpu(monkeypatch)
    with pytest.warns(UserWarning, match="installed without compiled ops.*PRFL_CUDA=on pip install"):
        load(tmp_path / "not-there.so")


@pytest.mark.skipif(library.COMPILED is None, reason="installed without compiled ops")
def test_a_library_without_cuda_kernels_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(library, "_read_info", lambda path: CompiledOps("", (), "PRFL_CUDA=off"))
    with pytest.warns(UserWarning, match="no CUDA kernels: PRFL_CUDA=off"):
        load()
    monkeypatch.setattr(library, "_read_info", lambda path: CompiledOps("13.0", ("sm_90a",), ""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()


def test_a_library_that_does_not_load_is_announced(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    with pytest.warns(UserWarning, match="do not load, plain torch runs instead"):
        assert load(broken) is None
