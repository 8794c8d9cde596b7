"""Machine code of the solver step, read without a GPU: registers, stack, architectures, exported symbols."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prfl_fast.ops.library import COMPILED, PATH

# Kernel variants in csrc/ops/solver_step/cuda.cu: float rows 2, 4, 16 and double rows 4, 16, each with its transpose.
VARIANTS = 10

compiled = pytest.mark.skipif(COMPILED is None, reason="installed without compiled ops")
with_cuda = pytest.mark.skipif(COMPILED is None or not COMPILED.cuda, reason="built without CUDA kernels")


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def stacks(usage: str) -> list[tuple[int, int]]:
    """Bytes of stack and of local memory of each function."""
    found = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return [(int(stack), int(local)) for stack, local in found]


@with_cuda
def test_cuda_kernels_use_no_stack_on_any_architecture() -> None:
    assert COMPILED is not None
    machine_code = [arch for arch in COMPILED.archs if arch.startswith("sm_")]
    usage = cuobjdump("-res-usage", str(PATH))
    mine = "\n".join(re.findall(r"Function \S*solver_step_kernel\S*:\n.*", usage))
    assert stacks(mine) == [(0, 0)] * VARIANTS * len(machine_code)


@with_cuda
def test_the_library_holds_the_architectures_that_it_says() -> None:
    assert COMPILED is not None
    listed = set(re.findall(r"\.(sm_\w+)\.", cuobjdump("-lelf", str(PATH))))
    listed |= {f"compute_{arch[3:]}" for arch in re.findall(r"\.(sm_\w+)\.ptx", cuobjdump("-lptx", str(PATH)))}
    # Older tools leave the suffix of sm_90a out.
    assert {arch.rstrip("af") for arch in COMPILED.archs} == {arch.rstrip("af") for arch in listed}


@with_cuda
def test_sums_are_fused_in_float64() -> None:
    assert COMPILED is not None
    (first,) = [arch for arch in COMPILED.archs if arch.startswith("sm_")][:1]
    code = cuobjdump("-sass", "-arch", first, str(PATH))
    # A product that is rounded before it is added would be DMUL and DADD.
    assert code.count("DFMA") > 100 and "DADD" not in re.sub(r"(?s)Function : \S*kernelId.*?(?=Function|\Z)", "", code)
    assert "LDG.E.128" in code and "STG.E.128" in code


def symbols(*flags: str) -> list[str]:
    listed = subprocess.run(["nm", "-D", "-C", *flags, str(PATH)], capture_output=True, text=True, check=True).stdout
    return [line.split(maxsplit=2)[-1] for line in listed.splitlines()]


@compiled
def test_only_torchs_stable_interface_is_used() -> None:
    wanted = symbols("--undefined-only")
    unstable = [name for name in wanted if re.search(r"\b(at|c10|torch|caffe2)::|Py[A-Z_]|THP", name)]
    assert not unstable
    assert any("torch_library_impl" in name for name in wanted)
    # nm names none of torch's C functions with ::, so their names say where they come from.
    assert not [name for name in wanted if "torch" in name.lower() and not re.match(r"U? ?(aoti_torch|torch)_", name)]


@compiled
def test_little_is_exported() -> None:
    # The CUDA runtime is linked statically and stays inside: torch has one of its own.
    exported = [name for name in symbols("--defined-only") if not name.startswith("_ZGV")]
    assert [name.split()[-1] for name in exported if "prfl" in name] == ["prfl_fast_build_info"]
    assert not [name for name in exported if "cuda" in name.lower()]


AHEAD_OF_TIME = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from prfl_fast.kernels.solver_step import solver_step_kernel

def compile_for(arch, state, output, transposed, full):
    n_terms, n_rows = (3, 2) if full else (1, 1)
    terms = tuple(["*" + state] * (n_terms - 1) + ["*" + output]) if not transposed else ("*" + state,) * n_terms
    rows = ("*" + state,) * n_rows if not transposed else tuple(["*" + state] * (n_rows - 1) + ["*" + output])
    signature = {
        "terms": terms, "second": "*" + (output if not transposed else "bf16"), "mask": "*u8",
        "parts": ("fp32",) * (3 * n_terms * n_rows), "guidance": ("fp32",) * 3,
        "rows": rows, "extra": "*bf16", "length": "i64",
    }
    constants = {
        "zero_pattern": (False,) * (n_terms * n_rows), "guided": n_terms - 1 if not transposed else n_rows - 1,
        "has_second": full, "has_mask": full, "has_extra": full, "transposed": transposed,
        "T": triton.language.float64 if state == "fp64" else triton.language.float32, "block": 1024,
        "G": triton.language.float64 if output == "fp64" else triton.language.bfloat16,
    }
    signature |= {name: "constexpr" for name in constants}
    source = ASTSource(solver_step_kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": False})
    return made.asm["cubin"]

import itertools, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for arch, (state, output), transposed, full in itertools.product(
    (80, 90, 100), (("fp32", "bf16"), ("fp64", "fp64")), (False, True), (False, True)
):
    cubin = compile_for(arch, state, output, transposed, full)
    (folder / f"{arch}-{state}-{transposed}-{full}.cubin").write_bytes(cubin)
"""


@pytest.mark.slow
def test_triton_compiles_ahead_of_time_without_stack(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, "-c", AHEAD_OF_TIME, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = sorted(tmp_path.glob("*.cubin"))
    assert len(made) == 24
    for cubin in made:
        assert stacks(cuobjdump("-res-usage", str(cubin))) == [(0, 0)], cubin.name


def test_torch_is_new_enough_for_the_library() -> None:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 10)
