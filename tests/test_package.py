"""The package as a whole: what it declares, what an import costs, and that its rooms import downwards only."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import prfl_fast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "prfl_fast"

# Room -> rooms that it may import. A new top-level module has to be given its place here.
ARROWS: dict[str, set[str]] = {
    "_env": set(),
    "charts": set(),
    "kernels": set(),
    "_native": set(),  # compiled: csrc/native
    "ops": {"_env", "kernels"},
    "solvers": {"ops"},
    "memory": {"ops", "_native"},
    "models": {"ops", "memory"},
    "pixels": set(),
    "sampling": {"charts", "ops", "solvers", "memory", "models", "pixels"},
    "reward": {"ops", "models"},
    "demo": {"charts", "sampling", "reward", ""},  # uses the public face, as a user does
    "training": {"models", "pixels", "reward", "sampling", ""},
    "twin": set(),
    "exactness": {"sampling", "twin"},
    "doctor": {"_env", "exactness", "memory", "ops", ""},
    "compile": {"kernels"},
    "benchmarks": {"ops", "memory", ""},
    "cli": {"benchmarks", "compile", "demo", "doctor", "training", ""},
    "": {"memory", "models", "pixels", "reward", "sampling", "solvers"},  # prfl_fast/__init__.py, the public face
}

# What no import may bring: the extras, and what is slow to load and only needed by some functions.
HEAVY = {
    "accelerate", "av", "diffusers", "flash_attn", "hypothesis", "matplotlib", "pandas", "peft", "PIL", "pytest",
    "scipy", "sklearn", "torchvision", "transformers", "triton", "xformers",
}  # fmt: skip


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_rooms(path: Path, known: set[str]) -> set[str]:
    """Rooms that the file imports anywhere, inside functions too."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    targets: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(filter(None, [*parts[: len(parts) - node.level + 1], base]))
            # "from prfl_fast import ops" names a room, "from prfl_fast import unrolled_sample" the public face
            for alias in node.names:
                full = f"{base}.{alias.name}"
                targets.add(full if base == "prfl_fast" and alias.name in known else base)
    return {room_of(target) for target in targets if target.split(".")[0] == "prfl_fast"}


def test_every_room_imports_only_what_lies_below_it() -> None:
    wrong = []
    for path in sources():
        room = room_of(module_name(path))
        assert room in ARROWS, f"{path}: give the room {room!r} its place in ARROWS"
        above = imported_rooms(path, set(ARROWS)) - ARROWS[room] - {room}
        wrong += [f"{path.relative_to(ROOT)} imports {other or 'prfl_fast'}" for other in sorted(above)]
    assert not wrong, "\n".join(wrong)


def test_the_arrows_have_no_circle() -> None:
    left = {room: set(below) for room, below in ARROWS.items()}
    while left:
        free = [room for room, below in left.items() if not below & left.keys()]
        assert free, f"circle among {sorted(left)}"
        for room in free:
            del left[room]


def test_the_import_check_sees_relative_and_local_imports(tmp_path: Path) -> None:
    room = tmp_path / "prfl_fast" / "ops"
    room.mkdir(parents=True)
    file = room / "some_op.py"
    file.write_text("from ..sampling import door\ndef f():\n    from prfl_fast import demo, unrolled_sample\n")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setitem(globals(), "ROOT", tmp_path)
        assert imported_rooms(file, set(ARROWS)) == {"sampling", "demo", ""}


def test_the_environment_is_read_in_one_file() -> None:
    readers = set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names}
            if names & {"environ", "environb", "getenv"}:
                readers.add(path.name)
    assert readers == {"_env.py"}


def child(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_bare_import_brings_nothing_but_the_standard_library() -> None:
    # Public names are imported on first use: without one, not even torch is paid for.
    loaded = set(child("import prfl_fast, sys; print(*sys.modules)").split())
    assert not loaded & (HEAVY | {"torch", "numpy"})
    assert {name for name in loaded if name.startswith("prfl_fast.")} == set()


def test_every_public_name_resolves_and_no_extra_is_imported() -> None:
    code = "import prfl_fast, sys; [getattr(prfl_fast, n) for n in prfl_fast.__all__]; print(*sys.modules)"
    before = set(child("import torch, numpy, tqdm, safetensors.torch, sys; print(*sys.modules)").split())
    brought = set(child(code).split()) - before
    assert not brought & HEAVY, sorted(brought & HEAVY)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prfl_fast.no_such_name
    assert set(prfl_fast.__all__) <= set(dir(prfl_fast))


def test_metadata() -> None:
    metadata = importlib.metadata.metadata("prfl-fast")
    assert metadata["Version"] == prfl_fast.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = importlib.metadata.requires("prfl-fast") or []
    always = {re.split(r"[\s<>=!~;\[]", line)[0] for line in required if "extra ==" not in line}
    assert always == {"torch", "numpy", "tqdm", "safetensors"}
    assert set(metadata.get_all("Provides-Extra")) == {"attention", "diffusers", "report", "test", "video"}
    scripts = importlib.metadata.entry_points(group="console_scripts", name="prfl-fast")
    assert [script.value for script in scripts] == ["prfl_fast.cli:main"]


def test_the_changelog_knows_this_version() -> None:
    assert re.search(rf"^## {re.escape(prfl_fast.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_wheel_carries_all_that_is_needed(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # From a copy: a build leaves folders beside the sources. What compiled parts a wheel has: tests/build.
    copied = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(copied)], check=True, capture_output=True)
    environment = {**os.environ, "PRFL_CUDA": "off"}
    done = subprocess.run([*build, "-w", str(tmp_path), str(copied)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("prfl_fast-*.whl")
    content = set(zipfile.ZipFile(wheel).namelist())
    committed = subprocess.run(
        ["git", "ls-files", "prfl_fast"], cwd=copied, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(committed) <= content
    assert not [name for name in content if name.startswith(("tests/", "benchmarks/"))]
