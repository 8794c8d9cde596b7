"""The stages of gpu_check.sh: each has its own time limit, and none depends on another's success.

Needs the standard library alone, so that it can still tell what happened when nothing else works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu_check" / "site"  # packages that were missing; the interpreter's own stay as they are

PASSED, FAILED, NO_GPU = 0, 1, 3
MOST_SECONDS = 510  # of all stages together
TAIL_LINES, TAIL_CHARACTERS = 40, 6000

# Import name -> what pip calls it. torch and triton are the machine's own: another would be another experiment.
NEEDED = {
    "numpy": "numpy",
    "tqdm": "tqdm",
    "safetensors": "safetensors",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "setuptools": "setuptools",
    "pybind11": "pybind11",
    "cmake": "cmake",
    "ninja": "ninja",
}
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

ABOUT = """
import importlib.metadata as m, json, torch
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
told = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
told |= {name: version(name) for name in ("triton", "diffusers", "numpy")}
if told["available"]:
    card = torch.cuda.get_device_properties(0)
    told |= {"device": card.name, "capability": f"{card.major}.{card.minor}"}
print(json.dumps(told))
"""


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        limit: seconds.
        must_say: pattern in its output without which it has failed whatever its exit code: a check that checked
            nothing is none.
        variables: added to the environment.
    """

    name: str
    command: Sequence[str]
    limit: float
    needs_gpu: bool = True
    must_say: str = ""
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What there is; ``no_gpu`` says why there is no GPU."""

    device: str | None
    driver: str | None
    no_gpu: str | None
    versions: dict[str, Any]


def look() -> Machine:
    """Ask the driver and torch, each in a process of its own."""
    driver, driver_says = ask(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    told, torch_says = ask([sys.executable, "-c", ABOUT])
    versions: dict[str, Any] = {"python": platform.python_version()}
    about: dict[str, Any] = json.loads(told.splitlines()[-1]) if told else {}
    versions |= {name: about[name] for name in about if name not in ("available", "device")}
    for tool in ("nvcc", "compute-sanitizer"):
        answer, _ = ask([tool, "--version"])
        versions[tool] = (re.findall(r"\d+\.\d[\d.]*", answer or "") or [None])[0]
    reason = None
    if driver is None:
        reason = driver_says
    elif not about:
        reason = f"torch does not answer: {torch_says}"
    elif not about["available"]:
        built = "is built without CUDA" if about["cuda"] is None else "sees no device"
        reason = f"torch {about['torch']} {built}"
    return Machine(about.get("device"), driver, reason, versions)


def ask(command: Sequence[str], seconds: float = 60) -> tuple[str | None, str]:
    """Its output, or None and the reason."""
    if shutil.which(command[0]) is None:
        return None, f"{command[0]} is not installed"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment({}))
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} does not answer within {seconds:.0f} s"
    said = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()
    if done.returncode or not said:
        return None, f"{command[0]} fails: {(said.splitlines() or ['no message'])[-1]}"
    return said, ""


def environment(variables: dict[str, str]) -> dict[str, str]:
    """Of every stage: this checkout's package first, one thread a process."""
    paths = [str(ROOT), str(SITE), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **ours, **variables}


def missing() -> list[str]:
    """Packages to install; cmake and ninja may also be programs."""
    here = [name for name in NEEDED if importlib.util.find_spec(name) or (SITE / name).exists()]
    here += [name for name in ("cmake", "ninja") if shutil.which(name)]
    return [NEEDED[name] for name in NEEDED if name not in here]


def plan(out: Path, gpu: bool, wheels: Path | None) -> list[Stage]:
    """All stages in their order."""
    python = sys.executable
    lacking = missing()
    stages = []
    if lacking:
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--target"]
        install = [*pip, str(SITE), "--find-links", str(wheels), *lacking]
        say = f"import sys; sys.exit('not installed: {', '.join(lacking)}; give their wheels by --wheels DIR')"
        stages.append(Stage("packages", [python, "-c", say] if wheels is None else install, 60, needs_gpu=False))
    build = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    stages.append(Stage("build", build, 150, needs_gpu=False, variables={"PRFL_CUDA": "on" if gpu else "auto"}))
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    on_gpu = sorted(str(p) for p in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in p.read_text())
    stages.append(Stage("correctness", [*pytest, "-m", "gpu", *on_gpu], 90, must_say=r"\b[1-9]\d* passed"))
    # Every tensor an allocation of its own: an access beside one is then seen. memcheck's report of calls that return
    # an error is off: torch asks some only to learn that.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [python, str(ROOT / "benchmarks" / "sanitized_ops.py")]
    for tool in SANITIZERS:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "86"]
        sanitizer += ["--report-api-errors", "no"] if tool == "memcheck" else []
        says = r"\b[1-9]\d* cases hold"
        stages.append(Stage(tool, [*sanitizer, *script], 60, must_say=says, variables=alone))
    bench = [python, "-m", "prfl_fast.cli", "bench", "--output", str(out / "benchmarks")]
    bench += ["--device", "cuda", "--seconds", "0.3"] if gpu else ["--device", "cpu", "--seconds", "0.01", "--tiny"]
    bench += [] if gpu else ["solver_step", "query_pool"]
    stages.append(Stage("benchmarks", bench, 120, needs_gpu=False, must_say="complete"))
    cpu = [*pytest, "-m", "not gpu and not slow", "tests/ops"]
    stages.append(Stage("other backends", cpu, 120, needs_gpu=False, must_say=r"\b[1-9]\d* passed"))
    return stages


def run_stage(stage: Stage, log: Path, seconds: float) -> dict[str, Any]:
    """Runs it for at most ``seconds``, then ends it with all that it has started."""
    told: dict[str, Any] = {"stage": stage.name, "command": list(stage.command), "limit": round(seconds, 1)}
    start = time.monotonic()
    position = log.stat().st_size if log.exists() else 0
    with log.open("ab") as file:
        file.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n".encode())
        file.flush()
        position = file.tell()
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(stage.variables),
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n".encode())
            code, reason = 127, f"does not start: {error}"
        else:
            code, reason = wait(process, seconds)
    with log.open("rb") as file:
        file.seek(position)
        said = file.read().decode(errors="replace")
    if not reason and code:
        reason = f"exit code {code}"
    if not reason and stage.must_say and not re.search(stage.must_say, said):
        reason = f"nothing was checked: no {stage.must_say!r} in its output"
    told |= {"status": "failed" if reason else "passed", "seconds": round(time.monotonic() - start, 1)}
    told |= {"returncode": code, "reason": reason or None}
    told["tail"] = "\n".join(said.splitlines()[-TAIL_LINES:])[-TAIL_CHARACTERS:]
    return told


def wait(process: subprocess.Popen[bytes], seconds: float) -> tuple[int, str]:
    """Exit code, and the reason where time ran out. Nothing of its session lives on."""
    try:
        return process.wait(seconds), ""
    except subprocess.TimeoutExpired:
        return 124, f"took longer than {seconds:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # all have ended
        process.wait()


def check(stages: Sequence[Stage], machine: Machine, out: Path, commit: str | None, most: float = MOST_SECONDS) -> int:
    """Runs all stages and writes ``gpu_check.json`` after each; returns the exit code."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu_check.log"
    log.write_text("")
    start = time.monotonic()
    summary: dict[str, Any] = {
        "status": "running",
        "device": machine.device,
        "driver": machine.driver,
        "no_gpu": machine.no_gpu,
        "versions": machine.versions,
        "commit": commit,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": 0.0,
        "stages": [],
    }

    def keep() -> None:
        summary["seconds"] = round(time.monotonic() - start, 1)
        beside = out / "gpu_check.json.part"
        beside.write_text(json.dumps(summary, indent=2) + "\n")
        beside.replace(out / "gpu_check.json")

    keep()
    for stage in stages:
        left = most - (time.monotonic() - start)
        if stage.needs_gpu and machine.no_gpu is not None:
            told = {"stage": stage.name, "status": "skipped", "reason": f"no GPU: {machine.no_gpu}"}
        elif left < 1:
            told = {"stage": stage.name, "status": "failed", "reason": f"not run: {most:.0f} s are over"}
        else:
            print(f"{stage.name} ...", flush=True)
            told = run_stage(stage, log, min(stage.limit, left))
        summary["stages"].append(told)
        keep()
        print(line(told), flush=True)
    failed = [told["stage"] for told in summary["stages"] if told["status"] == "failed"]
    summary["status"] = "failed" if failed else "no GPU" if machine.no_gpu is not None else "passed"
    summary["benchmarks"] = reports(out / "benchmarks")
    keep()
    if failed:
        print(f"failed: {', '.join(failed)}")
    if machine.no_gpu is not None:
        print(f"no GPU: {machine.no_gpu}; what needs one was not checked")
    print(f"{out / 'gpu_check.json'}: {summary['status']} in {summary['seconds']} s")
    return FAILED if failed else PASSED if machine.no_gpu is None else NO_GPU


def line(told: dict[str, Any]) -> str:
    """A stage for the terminal, with its last words where it failed."""
    took = f" in {told['seconds']} s" if "seconds" in told else ""
    reason = f": {told['reason']}" if told["reason"] else ""
    tail = f"\n{told['tail']}" if told["status"] == "failed" and "tail" in told else ""
    return f"{told['stage']}: {told['status']}{took}{reason}{tail}"


def reports(folder: Path) -> dict[str, Any]:
    """The benchmarks' JSON, whole or partial, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def own_commit() -> str | None:
    """Of this checkout, with a + where something in it was changed."""
    head, _ = ask(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    changed, _ = ask(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return None if head is None else head + ("+" if changed else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see gpu_check.sh."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description="Build, correctness, sanitizers, benchmarks.")
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="results (none: $OUT, else out/gpu_check)")
    parser.add_argument("--wheels", metavar="DIR", help="wheels of Python packages that the machine lacks")
    parser.add_argument("--commit", metavar="NAME", help="told in the JSON where the tree came without its .git")
    options = parser.parse_args(arguments)
    wheels = None if options.wheels is None else Path(options.wheels).resolve()
    if wheels is not None and not wheels.is_dir():
        parser.error(f"--wheels: expected a folder, got {options.wheels!r}")
    out = Path(options.folder or os.environ.get("OUT") or ROOT / "out" / "gpu_check").resolve()
    machine = look()
    where = machine.device if machine.no_gpu is None else f"no GPU: {machine.no_gpu}"
    print(f"{where}; {', '.join(f'{name} {version}' for name, version in machine.versions.items() if version)}")
    return check(plan(out, machine.no_gpu is None, wheels), machine, out, options.commit or own_commit())


if __name__ == "__main__":
    sys.exit(main())
