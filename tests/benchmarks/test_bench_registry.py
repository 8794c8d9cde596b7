"""The registry of benchmarks: complete, cheap to read, and helpful about names that are not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import prfl_fast
from prfl_fast.benchmarks.registry import BENCHMARKS, Setting, choose


def test_every_file_is_registered_and_every_entry_has_its_file() -> None:
    folder = Path(prfl_fast.__file__).parent / "benchmarks"
    assert {f"bench_{name}" for name in BENCHMARKS} == {path.stem for path in folder.glob("bench_*.py")}
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and benchmark.measures and set(benchmark.devices) <= {"cpu", "cuda"}


def test_without_names_all_that_the_device_runs() -> None:
    assert [b.name for b in choose([], "cpu")] == [n for n, b in BENCHMARKS.items() if "cpu" in b.devices]
    assert {b.name for b in choose([], "cuda")} == {n for n, b in BENCHMARKS.items() if "cuda" in b.devices}


def test_names_in_the_order_given_each_once() -> None:
    assert [b.name for b in choose(["query_pool", "solver_step", "query_pool"], "cpu")] == ["query_pool", "solver_step"]


@pytest.mark.parametrize(
    ("name", "hint"), [("solver_stp", "did you mean 'solver_step'?"), ("querypool", "did you mean 'query_pool'?")]
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match="names: expected some of solver_step, .*") as caught:
        choose(["solver_step", name], "cpu")
    assert str(caught.value).endswith(f"got {name!r}; {hint}")


def test_a_name_like_none_gets_no_hint() -> None:
    with pytest.raises(ValueError, match="got 'zzz'$"):
        choose(["zzz"], "cpu")


def test_a_benchmark_for_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="device: chain_memory runs on cpu, got 'cuda'"):
        choose(["chain_memory"], "cuda")


def test_the_index_is_no_part_of_the_kind() -> None:
    assert Setting("cuda:1").kind == "cuda" and Setting("cpu").kind == "cpu"


def test_listing_loads_no_torch() -> None:
    code = "import sys\nfrom prfl_fast.cli import main\nassert main(['bench', '--list']) == 0\n" + (
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(BENCHMARKS)
