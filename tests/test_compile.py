"""`prfl-fast compile`: what it takes, what it keeps when it is stopped, and what the machine code of our kernels is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl_fast import cli
from prfl_fast import compile as compiling

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "results" / "compiled_kernels.json"

# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}

# A word is parked on the stack for the length of a program so that one more block fits on a multiprocessor: one write,
# one read. These kernels of the table do so.
PARKED = {
    ("sm_90", "solver_step_kernel", "solver_step: UniPC forward"),
    ("sm_100", "qk_norm_rope_backward_kernel", "qk_norm_rope: Wan 14B 40x128 backward"),
}

# The widest rows, the one that no power of two divides, and heads of both sizes.
NAMES = [
    "gated_residual_norm: Wan 14B 5120 forward",
    "gated_residual_norm: Wan 14B 5120 backward frozen",
    "modulated_norm: Wan 14B 5120 backward",
    "gated_residual_norm: CogVideoX 2B 1920 backward frozen",
    "qk_norm_rope: Wan 14B 40x128 forward",
    "qk_norm_rope: Wan 14B 40x128 backward",
    "qk_norm_rope: CogVideoX 5B 48x64 backward frozen",
    "solver_step: UniPC forward",
]


def rows_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_what_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton import knobs

    from prfl_fast.kernels import ahead_of_time

    report = tmp_path / "report.json"
    for flags, message in (
        (["--arch", "sm_80,sm_12"], "arch: expected some of sm_80, sm_90, sm_100, got sm_80, sm_12"),
        (["--arch", ","], "arch: expected some of sm_80, sm_90, sm_100, got none"),
        (["--arch", "sm_80", "--op", "paint"], "op: expected some of"),
    ):
        assert cli.main(["compile", *flags, "--report", str(report)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="names: no launch is called nobody"):
        compiling.compile_kernels(["sm_80"], names=["nobody"])
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "interpret", True)
        assert cli.main(["compile"]) == 2
        assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(ahead_of_time.triton, "__file__", str(tmp_path / "__init__.py"))
        assert cli.main(["compile"]) == 2
        assert "comes without cuobjdump" in capsys.readouterr().err
    assert not report.exists()


def made(**changes: Any) -> Any:
    from prfl_fast.kernels.ahead_of_time import Compiled

    numbers: dict[str, Any] = {"registers": 64, "stack": 0, "spills": 0, "shared": 0, "warps": 4, "tensor_core": 0}
    numbers |= {"kernel": "k", "loads": {"128": 2}, "stores": {}, "copies": {}, "seconds": 0.5}
    return Compiled(**numbers | changes)


def test_ctrl_c_keeps_what_was_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from prfl_fast.kernels import ahead_of_time

    count = []

    def compile_kernel(*arguments: Any) -> Any:
        count.append(arguments)
        if len(count) == 3:
            raise KeyboardInterrupt
        return made()

    monkeypatch.setattr(ahead_of_time, "compile_kernel", compile_kernel)
    report = tmp_path / "new" / "report.json"
    flags = ["compile", "--arch", "sm_90", "--op", "solver_step", "--report", str(report)]
    assert cli.main(flags) == 130
    content = rows_of(report)
    assert content["complete"] is False
    assert [row["arch"] for row in content["kernels"]] == ["sm_90", "sm_90"]
    assert list(report.parent.iterdir()) == [report]


@pytest.mark.parametrize(("spills", "code"), [(0, 0), (2, 0), (3, 1)])
def test_exit_code_and_table(
    spills: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prfl_fast.kernels import ahead_of_time

    monkeypatch.setattr(ahead_of_time, "compile_kernel", lambda *_: made(spills=spills, registers=77))
    assert cli.main(["compile", "--arch", "sm_80", "--op", "solver_step"]) == code
    shown = capsys.readouterr()
    assert "77" in shown.out
    assert "solver_step: UniPC float64 backward" in shown.out
    assert f"6 kernels by Triton {ahead_of_time.triton.__version__}, {6 if code else 0} spill registers" in shown.out
    assert "100%" in shown.err  # the bar


def test_launches_have_names_of_their_own() -> None:
    from prfl_fast.kernels import configurations

    for architecture in compiling.ARCHITECTURES.values():
        launches = configurations.production(architecture)
        names = [(launch.op, launch.name) for launch in launches]
        assert len(names) == len(set(names))
        assert all(name == name.strip() and "  " not in name for _, name in names)


def test_shapes_without_memory_compile_as_tensors_do() -> None:
    """Dtypes, constants and divisibility of a launch on meta tensors are those of one on real ones."""
    from functools import partial

    from prfl_fast.kernels import ahead_of_time, configurations, row_launch

    def prepared(device: str, channels: int) -> list[Any]:
        x = torch.zeros(2, 3, channels, dtype=torch.bfloat16, device=device)
        chunk = torch.zeros(2, 1, 6, channels, device=device)[:, :, 1]
        run = partial(row_launch.forward, x, x, chunk, None, chunk, None, None, (1, 2), 1e-6, False, True)
        calls = ahead_of_time.recorded(configurations.Launch("op", "name", run))
        assert len(calls) == 1
        source, _, options = ahead_of_time.prepare(*calls[0], 90)
        return [source.signature, source.constants, source.attrs, options]

    for channels in (32, 33):
        assert prepared("meta", channels) == prepared("cpu", channels)
    assert prepared("cpu", 32) != prepared("cpu", 33)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The subset, by the command line in a child: other tests import the kernels for the interpreter."""
    report = tmp_path_factory.mktemp("compile") / "report.json"
    code = (
        "from prfl_fast.compile import compile_kernels\n"
        f"compile_kernels(names={NAMES!r}, report={str(report)!r}, progress=False)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return rows_of(report)


def label(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["arch"], row["kernel"], row["launches"][0]


@pytest.mark.slow
def test_no_loop_spills_and_shared_memory_fits(compiled: dict[str, Any]) -> None:
    assert compiled["complete"]
    for arch in SHARED:
        launches = {name for row in compiled["kernels"] if row["arch"] == arch for name in row["launches"]}
        assert launches == set(NAMES)
    for row in compiled["kernels"]:
        assert row["stack"] <= 8 and row["spills"] <= compiling.PARKED, label(row)
        assert row["shared"] <= SHARED[row["arch"]]
        assert row["registers"] <= 255


@pytest.mark.slow
def test_rows_are_read_and_written_in_wide_pieces(compiled: dict[str, Any]) -> None:
    """64 bits a thread and more; a row's statistics are single words. A warp then covers whole sectors of 32 bytes."""
    checked = 0
    for row in compiled["kernels"]:
        if row["kernel"].startswith(("row_", "qk_norm_rope_")):
            # Per piece of a row of heads one word of statistics, or two.
            most = 2 if row["kernel"].startswith("row_") else 12
            for accesses in (row["loads"], row["stores"]):
                assert set(accesses) <= {"32", "64", "128", "256"}, label(row)
                assert accesses.get("32", 0) <= most, label(row)
                assert sum(count for bits, count in accesses.items() if int(bits) >= 64) >= 3, label(row)
            checked += 1
    assert checked == 3 * 7


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("launches", "seconds")}


def test_the_table_is_whole() -> None:
    table = rows_of(TABLE)
    assert table["complete"]
    assert {row["arch"] for row in table["kernels"]} == set(SHARED)
    for row in table["kernels"]:
        assert row["spills"] <= compiling.PARKED and row["stack"] <= 16, label(row)
        assert row["shared"] <= SHARED[row["arch"]], label(row)
    ours = [row for row in table["kernels"] if row["kernel"].startswith(("row_", "qk_", "column_", "solver_"))]
    assert {label(row) for row in ours if row["stack"]} == PARKED


@pytest.mark.slow
def test_the_table_is_what_is_compiled(compiled: dict[str, Any]) -> None:
    table = rows_of(TABLE)
    if table["triton"] != compiled["triton"]:
        pytest.skip(f"the table is Triton {table['triton']}'s; another version gives other registers")
    for row in compiled["kernels"]:
        alike = [
            numbers(other)
            for other in table["kernels"]
            if other["arch"] == row["arch"] and set(row["launches"]) & set(other["launches"])
        ]
        assert numbers(row) in alike, label(row)
