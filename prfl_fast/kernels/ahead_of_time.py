"""Kernels compiled without a GPU, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from prfl_fast.kernels.configurations import Launch


@dataclass(frozen=True)
class Compiled:
    """What was made of one kernel for one architecture.

    Attributes:
        kernel: the kernel's function.
        registers: of a thread.
        stack: bytes of a thread; spilled registers are there.
        spills: reads and writes of the stack.
        shared: bytes of shared memory of a block.
        warps: of a block.
        loads: global loads by width in bits, ``{"128": 12, ...}``, copies to shared memory left out.
        stores: global stores likewise.
        tensor_core: matrix instructions.
        copies: asynchronous copies from global memory to shared memory and back, by instruction.
        seconds: of compilation.
    """

    kernel: str
    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    loads: dict[str, int]
    stores: dict[str, int]
    tensor_core: int
    copies: dict[str, int]
    seconds: float


@contextmanager
def private_cache() -> Iterator[None]:
    """Triton's cache in a new folder, so that what is timed is compiled; the folder goes at the end."""
    with tempfile.TemporaryDirectory(prefix="prfl-fast-compile-") as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def tool() -> Path:
    """cuobjdump as it comes with Triton.

    Raises:
        FileNotFoundError: this build of Triton has none.
    """
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.is_file():
        raise FileNotFoundError(f"triton {triton.__version__} comes without {path.name} ({path}): reinstall triton")
    return path


def recorded(launch: Launch) -> list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]]:
    """The kernels that a launch would run, with their arguments."""
    calls = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.append((self, args, kwargs))

    run, JITFunction.run = JITFunction.run, note
    try:
        launch.run()
    finally:
        JITFunction.run = run
    return calls


def prepare(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], architecture: int) -> tuple[Any, ...]:
    """Source, target and options: what a launch with these arguments compiles on that architecture.

    Binding and specialization are Triton's own, which asks a driver for the target and nothing else.
    """
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, **kwargs
    )
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes), target, options.__dict__


def compile_kernel(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    """Compile and read registers, memory and instructions."""
    begin = time.perf_counter()
    made = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - begin
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _read("-res-usage", file.name)
        code = _read("-sass", file.name)
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump -res-usage: expected one function of {source.name}, got:\n{usage}")
    registers, stack, static = map(int, found[0])
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.a-z]*)", code, re.MULTILINE)
    if not opcodes:
        raise RuntimeError(f"cuobjdump -sass: no instruction of {source.name} was found")
    return Compiled(
        kernel=source.name,
        registers=registers,
        stack=stack,
        spills=sum(name.split(".")[0] in ("LDL", "STL") for name in opcodes),
        shared=max(static, made.metadata.shared),
        warps=made.metadata.num_warps,
        loads=_widths(opcodes, ("LDG", "LD")),
        stores=_widths(opcodes, ("STG", "ST")),
        tensor_core=sum(bool(re.match(r"(H|I|D|Q|O|HG|QG|IG|BG)MMA|UTC\w*MMA", name)) for name in opcodes),
        copies=_count(opcodes, r"LDGSTS|UTMA(LDG|STG|REDG)|UBLKCP"),
        seconds=round(seconds, 2),
    )


def _read(flag: str, name: str) -> str:
    return subprocess.run([str(tool()), flag, name], capture_output=True, text=True, check=True).stdout


def _widths(opcodes: list[str], names: tuple[str, ...]) -> dict[str, int]:
    counts: dict[int, int] = {}
    for opcode in opcodes:
        name, *rest = opcode.split(".")
        if name in names:
            bits = next((int(part) for part in reversed(rest) if part in ("64", "128", "256")), None)
            narrow = next((int(part[1:]) for part in rest if part in ("U8", "S8", "U16", "S16")), 32)
            counts[bits or narrow] = counts.get(bits or narrow, 0) + 1
    return {str(bits): counts[bits] for bits in sorted(counts)}


def _count(opcodes: list[str], pattern: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for opcode in opcodes:
        name = opcode.split(".")[0]
        if re.fullmatch(pattern, name):
            counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
