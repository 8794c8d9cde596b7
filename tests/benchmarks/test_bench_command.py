"""``prfl-fast bench``: every benchmark in its tiny form, and what the command does with rows, errors and Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prfl_fast import cli
from prfl_fast.benchmarks import registry
from prfl_fast.benchmarks import run as bench_run
from prfl_fast.benchmarks.registry import BENCHMARKS, Benchmark, Row, Setting

KEYS = {  # of every row of the benchmarks that are no contests; see test_bench_contest.py for those
    "chain_memory": {"way", "steps", "peak_bytes", "network_calls", "seconds", "relative_difference"},
    "chain_overhead": {"scheduler", "solver", "graph", "forward", "forward_backward", "first_probe_ms"},
    "chunked_decode": {"way", "latent_frames", "frames", "peak_bytes", "processor_seconds"},
    "memory_plan": {"model", "size", "device", "memory_bytes", "trained", "least_bytes", "fits"},
    "solve_chain": {"family", "blocks", "modes", "solves", "optimal", "seconds_median", "seconds_max", "megabytes"},
}


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_every_benchmark_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in BENCHMARKS[name].needs:
        pytest.importorskip(package)
    words = ["bench", name, "--device", "cpu", "--tiny", "--seconds", "0.001", "--output", str(tmp_path), "--json"]
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    (report,) = json.loads(shown.out)
    file = tmp_path / (f"{name}.json" if BENCHMARKS[name].on_host else f"{name}_cpu.json")
    assert json.loads(file.read_text()) == report
    assert report["benchmark"] == name and report["status"] == "complete" and report["tiny"] and report["rows"]
    assert {"device", "versions", "commit", "load", "threads"} <= report["about"].keys() and report["details"]
    assert KEYS.get(name, {"op"}) <= set.intersection(*(set(row) for row in report["rows"]))
    assert f"[1/1] {name} on cpu" in shown.err and "complete" in shown.err
    assert len([text for text in shown.err.splitlines() if text.startswith("  ")]) == len(report["rows"])


class Fake:
    """A benchmark's module with these rows; an exception among them is raised."""

    def __init__(self, *rows: Row | BaseException) -> None:
        self.given = rows
        self.threads: list[int] = []

    def details(self, setting: Setting) -> dict[str, Any]:
        return {"seconds": setting.seconds}

    def rows(self, setting: Setting) -> Iterator[Row]:
        for row in self.given:
            self.threads.append(torch.get_num_threads())
            if isinstance(row, BaseException):
                raise row
            yield row


def pretend(monkeypatch: pytest.MonkeyPatch, module: Fake, **changes: Any) -> None:
    only = Benchmark("fake", "nothing", ("cpu",), **changes)
    monkeypatch.setattr(Benchmark, "load", lambda self: module)
    monkeypatch.setattr(registry, "BENCHMARKS", {"fake": only})


def bench(*words: str) -> int:
    return cli.main(["bench", "fake", "--device", "cpu", *words])


def test_ctrl_c_keeps_the_rows_so_far(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(monkeypatch, Fake({"a": 1}, {"a": 2}, KeyboardInterrupt(), {"a": 3}))
    assert bench("--output", str(tmp_path), "--json") == 130
    (report,) = json.loads(capsys.readouterr().out)
    assert report["status"] == "partial" and report["rows"] == [{"a": 1}, {"a": 2}]
    assert json.loads((tmp_path / "fake_cpu.json").read_text()) == report


def test_rows_are_on_disk_as_they_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    class Watching(Fake):
        def rows(self, setting: Setting) -> Iterator[Row]:
            for row in super().rows(setting):
                yield row
                seen.append(len(json.loads((tmp_path / "fake_cpu.json").read_text())["rows"]))

    pretend(monkeypatch, Watching({"a": 1}, {"a": 2}))
    assert bench("--output", str(tmp_path)) == 0
    assert seen == [1, 2]


def test_a_wrong_row_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch, Fake({"way": "mine", "wrong": "far off"}, {"way": "theirs", "absent": "not here"}))
    assert bench() == 1
    assert capsys.readouterr().out.splitlines() == ["  mine: WRONG: far off", "  theirs: absent: not here"]


def test_rows_are_readable(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timed = {"op": "x", "shape": "big", "dtype": "float32", "direction": "forward", "backend": "cuda", "runs": 5}
    timed |= {"median_us": 12.345, "p20_us": 12.0, "p80_us": 13.0, "share_of_copy_speed": 0.876}
    pretend(monkeypatch, Fake(timed, {"steps": 4, "seconds": 0.123456, "peer": {"median": 1.5}}))
    assert bench("--seconds", "0.5") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "  big  float32  forward  cuda: 12.35 us (12 to 13), 87.6% of the copy speed" or "12.34" in first
    assert second == "  steps 4, seconds 0.1235, peer (median 1.5)"


def test_a_missing_package_is_told_in_the_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, Fake({"a": 1}), needs=("no_such_package_here",))
    assert bench("--output", str(tmp_path)) == 0
    (row,) = json.loads((tmp_path / "fake_cpu.json").read_text())["rows"]
    assert row["absent"].startswith("no_such_package_here not installed")


def test_one_thread_where_the_benchmark_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    module = Fake({"a": 1})
    pretend(monkeypatch, module, one_thread=True)
    try:
        torch.set_num_threads(2)
        assert bench() == 0
        assert module.threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["solver_stepp"], "did you mean 'solver_step'?"),
        (["--device", "tpu"], "device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cpu:1"], "got 'cpu:1'"),
        (["--seconds", "0"], "seconds: expected a number above zero, got 0.0"),
        (["--seconds", "nan"], "seconds: expected a number above zero, got nan"),
        (["--device", "cuda:99"], "CUDA devices here, got 'cuda:99'"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--tiny", *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and "Traceback" not in shown.err and not shown.out


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bench_run.setting_for().device == "cuda" and bench_run.setting_for("cuda:1").device == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_run.setting_for().device == "cpu"
