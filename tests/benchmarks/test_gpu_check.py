"""The GPU check without a GPU: stages that fail, hang or check nothing, and what its JSON tells of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check = load()
GPU = check.Machine("NVIDIA H200", "580.1", None, {"torch": "2.11.0+cu130"})
NO_GPU = check.Machine(None, None, "nvidia-smi is not installed", {"torch": "2.13.0+cpu"})


def stage(name: str, shell: str, limit: float = 10, **more: Any) -> Any:
    return check.Stage(name, ["sh", "-c", shell], limit, **more)


def outcome(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "gpu_check.json").read_text())
    return told


def test_a_failing_stage_does_not_stop_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [stage("one", "echo first"), stage("two", "echo second >&2; exit 7"), stage("three", "echo third")]
    assert check.check(stages, GPU, tmp_path, "abc+") == 1
    told = outcome(tmp_path)
    assert (told["status"], told["device"], told["driver"], told["commit"]) == (
        "failed",
        "NVIDIA H200",
        "580.1",
        "abc+",
    )
    assert told["versions"] == {"torch": "2.11.0+cu130"} and told["no_gpu"] is None
    assert [(s["stage"], s["status"], s["returncode"], s["tail"]) for s in told["stages"]] == [
        ("one", "passed", 0, "first"),
        ("two", "failed", 7, "second"),
        ("three", "passed", 0, "third"),
    ]
    assert all({"seconds", "limit", "command", "reason"} <= s.keys() for s in told["stages"])
    assert told["stages"][1]["reason"] == "exit code 7"
    log = (tmp_path / "gpu_check.log").read_text()
    assert log.index("first") < log.index("second") < log.index("third")
    shown = capsys.readouterr().out
    assert "two: failed" in shown and "second" in shown and "failed: two" in shown


def test_all_passed(tmp_path: Path) -> None:
    assert check.check([stage("one", "echo '3 passed'", must_say=r"[1-9]\d* passed")], GPU, tmp_path, None) == 0
    assert outcome(tmp_path)["status"] == "passed"


def test_a_stage_that_checked_nothing_has_failed(tmp_path: Path) -> None:
    assert check.check([stage("one", "echo '0 passed'", must_say=r"\b[1-9]\d* passed")], GPU, tmp_path, None) == 1
    assert "nothing was checked" in outcome(tmp_path)["stages"][0]["reason"]


def test_a_program_that_is_missing_fails_its_stage_alone(tmp_path: Path) -> None:
    gone = check.Stage("gone", ["no-such-program-here"], 5)
    assert check.check([gone, stage("next", "echo here")], GPU, tmp_path, None) == 1
    first, second = outcome(tmp_path)["stages"]
    assert first["returncode"] == 127 and "does not start" in first["reason"] and second["status"] == "passed"


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_time_runs_out_for_a_stage_and_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hanging = stage("hanging", f"sleep 60 & echo $! > {pid}; echo started; wait", limit=0.5)
    start = time.monotonic()
    assert check.check([hanging, stage("next", "echo here")], GPU, tmp_path, None) == 1
    assert time.monotonic() - start < 30
    first, second = outcome(tmp_path)["stages"]
    assert (first["returncode"], first["tail"], second["status"]) == (124, "started", "passed")
    assert "longer than" in first["reason"]
    child = int(pid.read_text())
    end = time.monotonic() + 10  # the kernel's own pace
    while alive(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not alive(child)


def test_what_no_time_is_left_for_has_failed(tmp_path: Path) -> None:
    stages = [stage("long", "sleep 30", limit=100), stage("next", "echo here")]
    assert check.check(stages, GPU, tmp_path, None, most=1.2) == 1
    first, second = outcome(tmp_path)["stages"]
    assert first["returncode"] == 124 and first["limit"] <= 1.2
    assert second["status"] == "failed" and "not run" in second["reason"]


def test_without_a_gpu_the_rest_is_done_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [stage("kernels", "echo never"), stage("build", "echo built", needs_gpu=False)]
    assert check.check(stages, NO_GPU, tmp_path, None) == 3
    told = outcome(tmp_path)
    assert told["status"] == "no GPU" and told["no_gpu"] == "nvidia-smi is not installed"
    skipped, built = told["stages"]
    assert skipped["status"] == "skipped" and skipped["reason"] == "no GPU: nvidia-smi is not installed"
    assert built["status"] == "passed"
    assert "no GPU: nvidia-smi is not installed" in capsys.readouterr().out
    broken = stage("build", "exit 1", needs_gpu=False)
    assert check.check([broken], NO_GPU, tmp_path, None) == 1  # a failure is not hidden behind a missing GPU
    assert outcome(tmp_path)["status"] == "failed"


def test_what_was_done_is_on_disk_while_the_next_stage_runs(tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    stages = [stage("one", "echo first"), stage("two", f"cp {tmp_path}/gpu_check.json {seen}")]
    check.check(stages, GPU, tmp_path, None)
    before = json.loads(seen.read_text())
    assert before["status"] == "running" and [s["stage"] for s in before["stages"]] == ["one"]


def test_reports_of_benchmarks_come_along_and_tails_are_short(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    write = f'mkdir {folder}; echo \'{{"status": "partial"}}\' > {folder}/op_nvidia_h200.json; seq 1 100000'
    check.check([stage("benchmarks", write)], GPU, tmp_path, None)
    told = outcome(tmp_path)
    assert told["benchmarks"] == {"op_nvidia_h200": {"status": "partial"}}
    tail = told["stages"][0]["tail"].splitlines()
    assert len(tail) == check.TAIL_LINES and tail[-1] == "100000"


def test_the_plan_fits_and_names_what_exists(tmp_path: Path) -> None:
    stages = {s.name: s for s in check.plan(tmp_path, True, None)}
    assert {"build", "correctness", "benchmarks", *check.SANITIZERS} <= stages.keys()
    assert check.MOST_SECONDS <= 9 * 60 - 20
    # Even if all before it take their whole time, the benchmarks still get some.
    names = list(stages)
    before = sum(stages[name].limit for name in names[: names.index("benchmarks")])
    assert check.MOST_SECONDS - before >= 20
    assert "tests/ops/test_solver_step_backends.py" in " ".join(stages["correctness"].command)
    for name in check.SANITIZERS:
        assert name in stages[name].command and stages[name].variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert stages["build"].variables == {"PRFL_CUDA": "on"}
    for words in (s.command for s in stages.values()):
        assert all(Path(word).exists() for word in words if word.startswith(str(ROOT)))
    without = {s.name: s for s in check.plan(tmp_path, False, None)}
    assert without["build"].variables == {"PRFL_CUDA": "auto"} and "--tiny" in without["benchmarks"].command
    assert [s.name for s in without.values() if not s.needs_gpu] == ["build", "benchmarks", "other backends"]


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "missing", lambda: ["pytest", "ninja"])
    first = check.plan(tmp_path, True, None)[0]
    told = check.run_stage(first, tmp_path / "log", 20)
    assert first.name == "packages" and told["status"] == "failed"
    assert "not installed: pytest, ninja; give their wheels by --wheels DIR" in told["tail"]
    install = check.plan(tmp_path, True, tmp_path / "wheels")[0].command
    assert install[-2:] == ["pytest", "ninja"] and str(tmp_path / "wheels") in install and "--no-index" in install


def test_missing_looks_at_modules_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "NEEDED", {"json": "json", "no_such_module": "some-package", "ninja": "ninja"})
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: name == "json" or None)
    monkeypatch.setattr(check.shutil, "which", lambda name: "/usr/bin/ninja" if name == "ninja" else None)
    assert check.missing() == ["some-package"]


def answers(**said: Any) -> Any:
    def ask(command: Any, seconds: float = 60) -> tuple[str | None, str]:
        given = said.get("torch" if command[0] == sys.executable else command[0].replace("-", "_"))
        return (given, "") if given else (None, f"{command[0]} is not installed")

    return ask


def test_what_kind_of_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = {"torch": "2.11.0+cu130", "cuda": "13.0", "available": True, "device": "NVIDIA H200", "triton": "3.6.0"}
    cases = [
        (answers(torch=json.dumps(card), nvidia_smi="580.1"), None),
        (answers(torch=json.dumps(card)), "nvidia-smi is not installed"),
        (
            answers(torch=json.dumps(card | {"available": False}), nvidia_smi="580.1"),
            "torch 2.11.0+cu130 sees no device",
        ),
        (
            answers(torch=json.dumps(card | {"available": False, "cuda": None}), nvidia_smi="580.1"),
            "torch 2.11.0+cu130 is built without CUDA",
        ),
        (answers(nvidia_smi="580.1"), f"torch does not answer: {sys.executable} is not installed"),
    ]
    for ask, reason in cases:
        monkeypatch.setattr(check, "ask", ask)
        machine = check.look()
        assert machine.no_gpu == reason
    monkeypatch.setattr(check, "ask", cases[0][0])
    machine = check.look()
    assert (machine.device, machine.driver, machine.versions["triton"]) == ("NVIDIA H200", "580.1", "3.6.0")
    assert dataclasses.is_dataclass(machine)


def test_the_script_refuses_what_it_does_not_know() -> None:
    script = [str(ROOT / "benchmarks" / "gpu_check.sh"), "--wheels", "/nowhere/at/all"]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 2 and "--wheels: expected a folder, got '/nowhere/at/all'" in done.stderr
