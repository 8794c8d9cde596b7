"""The ways to install: wheels from a checkout and from an sdist, with and without compiler, nvcc and isolation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout"),
]
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def copy_sources(to: Path) -> Path:
    """The working tree's tracked files: a build leaves folders beside them."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in {"CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH"}}
    return subprocess.run(command, env={**inherited, **variables}, capture_output=True, text=True)


def build_wheel(source: Path, to: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--verbose", "--no-deps"]
    return run([*pip, *(flags or ("--no-build-isolation", "--no-index")), "-w", str(to), str(source)], **variables)


def wheel_in(folder: Path) -> Path:
    (wheel,) = folder.glob("prfl_fast-*.whl")
    return wheel


def libraries(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}


OPS = "prfl_fast/libprfl_fast_ops.so"
NATIVE = f"prfl_fast/_native{sysconfig.get_config_var('EXT_SUFFIX')}"

PROBE = """
import json, sys, torch, prfl_fast
from prfl_fast import ops
from prfl_fast.ops.library import COMPILED
x = torch.randn(5, requires_grad=True)
c = ops.StepCoefficients(((0.5,),), (2.0,), ((),))
(result,) = ops.solver_step((x,), (x.detach(),), c)
result.sum().backward()
assert x.grad.equal(torch.full((5,), 0.5))
info = None if COMPILED is None else {"cuda": COMPILED.cuda, "archs": COMPILED.archs, "reason": COMPILED.reason}
print(json.dumps({"file": prfl_fast.__file__, "info": info, "op": result.grad_fn.name()}))
"""


def probe(wheel: Path, to: Path) -> dict[str, object]:
    """What the wheel's package says of itself, unpacked outside the sources."""
    zipfile.ZipFile(wheel).extractall(to)
    environment = {**os.environ, "PYTHONPATH": str(to)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], cwd=to, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    assert str(told["file"]).startswith(str(to))
    return told


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for all builds with the same compiler: later ones find its objects."""
    return copy_sources(tmp_path_factory.mktemp("checkout"))


@needs_compiler
def test_wheel_from_a_checkout_and_again(checkout: Path, tmp_path: Path) -> None:
    done = build_wheel(checkout, tmp_path, PRFL_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = wheel_in(tmp_path)
    assert libraries(wheel) == {OPS, NATIVE} and "none-any" not in wheel.name
    told = probe(wheel, tmp_path / "outside")
    assert told["info"] == {"cuda": "", "archs": [], "reason": "PRFL_CUDA=off"}
    assert "solver_step" in str(told["op"])
    again = build_wheel(checkout, tmp_path / "again", PRFL_CUDA="off")
    assert again.returncode == 0 and "ninja: no work to do" in again.stdout + again.stderr


@needs_compiler
def test_a_touched_file_alone_is_compiled_again(checkout: Path, tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)]
    inherited = {**os.environ, "PRFL_CUDA": "off"}
    first = subprocess.run(build, cwd=checkout, env=inherited, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    touched = checkout / "csrc/ops/solver_step/cpu.cpp"
    touched.write_text(touched.read_text() + "\n")
    second = subprocess.run(build, cwd=checkout, env=inherited, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("Building CXX object") == 1 and "cpu.cpp" in second.stdout


@needs_compiler
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_runs_from_the_checkout(checkout: Path, tmp_path: Path, mode: str) -> None:
    """In an environment of its own, which finds torch and the build tools in this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = tmp_path / "env/bin/python"
    asked = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    own = Path(sysconfig.get_path("purelib"))
    # A plain path, not a .pth that is executed: this environment's own editable prfl_fast stays out.
    (Path(asked.stdout.strip()) / "borrowed.pth").write_text(f"{own}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    flags = ["--no-build-isolation", "--no-deps", "--no-index", "--config-settings", f"editable_mode={mode}"]
    done = run([*pip, "--ignore-installed", *flags, "-e", str(checkout)], PRFL_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    answer = subprocess.run([str(python), "-c", PROBE], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    told = json.loads(answer.stdout)
    assert Path(told["file"]).resolve() == checkout / "prfl_fast/__init__.py"
    assert "solver_step" in told["op"] and told["info"]["reason"] == "PRFL_CUDA=off"


@needs_compiler
def test_wheel_from_an_sdist(checkout: Path, tmp_path: Path) -> None:
    code = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
    made = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=checkout, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    done = build_wheel(sdist, tmp_path, PRFL_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert libraries(wheel_in(tmp_path)) == {OPS, NATIVE}
    assert "solver_step" in str(probe(wheel_in(tmp_path), tmp_path / "outside")["op"])


@needs_compiler
def test_a_broken_nvcc_costs_the_cuda_kernels_alone(checkout: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    (checkout / "build").exists() and shutil.rmtree(checkout / "build")  # no compiler of an earlier build
    done = build_wheel(checkout, tmp_path, PRFL_CUDA="auto", CUDACXX=str(nvcc))
    assert done.returncode == 0, done.stdout + done.stderr
    told = probe(wheel_in(tmp_path), tmp_path / "outside")
    assert told["info"] == {"cuda": "", "archs": [], "reason": f"nvcc ({nvcc}) could not compile a test program"}
    asked = build_wheel(checkout, tmp_path / "on", PRFL_CUDA="on", CUDACXX=str(nvcc))
    assert asked.returncode != 0 and "PRFL_CUDA=on, but nvcc" in asked.stdout + asked.stderr
    wrong = build_wheel(checkout, tmp_path / "wrong", PRFL_CUDA="perhaps")
    assert wrong.returncode != 0 and "expected on, off or auto, got 'perhaps'" in wrong.stdout + wrong.stderr


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_one_architecture_is_built_as_asked(checkout: Path, tmp_path: Path) -> None:
    done = build_wheel(checkout, tmp_path, PRFL_CUDA="on", PRFL_CUDA_ARCHS="90a")
    assert done.returncode == 0, done.stdout + done.stderr
    info = probe(wheel_in(tmp_path), tmp_path / "outside")["info"]
    assert isinstance(info, dict) and info["archs"] == ["sm_90a"] and info["reason"] == ""


def without_compiler(to: Path) -> str:
    """A PATH with all that there is but the compilers."""
    for folder in filter(None, os.environ["PATH"].split(os.pathsep)):
        for tool in Path(folder).iterdir() if Path(folder).is_dir() else []:
            if tool.name not in {"c++", "g++", "clang++"} and not (to / tool.name).is_symlink():
                (to / tool.name).symlink_to(tool)
    return str(to)


def test_without_a_compiler_the_package_is_pure_python(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    source = copy_sources(tmp_path / "source")
    done = build_wheel(source, tmp_path, PATH=without_compiler(tmp_path / "bin"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler" in done.stdout + done.stderr
    wheel = wheel_in(tmp_path)
    assert wheel.name.endswith("py3-none-any.whl") and not libraries(wheel)
    assert probe(wheel, tmp_path / "outside")["info"] is None


def test_a_compiler_that_fails_is_an_error(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho cannot compile >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = build_wheel(copy_sources(tmp_path / "source"), tmp_path, CXX=str(compiler))
    assert done.returncode != 0 and not list(tmp_path.glob("*.whl"))
    assert "PRFL_CUDA=off builds without CUDA kernels" in done.stdout + done.stderr


@needs_compiler
def test_with_isolation_the_environments_torch_is_found(checkout: Path, tmp_path: Path) -> None:
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(tmp_path), "pybind11>=2.13"]
    if run(download).returncode != 0:
        pytest.skip("no package index can be reached")
    done = build_wheel(checkout, tmp_path, "--quiet", PRFL_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert libraries(wheel_in(tmp_path)) == {OPS, NATIVE}
