"""What a GPU would be given, compiled for it without one, and what that takes.

``recorded`` lists the launches of a launcher that runs on tensors without data, ``compile_launch`` compiles one of them
by Triton, which brings the assemblers of both makers, and reads registers, spills and shared memory from what they
write; ``faults`` holds these against the GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_THREADS = 1024  # of a program; compilers accept more, GPUs do not

_Place = tuple[int, ...]  # of an argument, or of a field of one


class Target(NamedTuple):
    """A GPU. shared: bytes of shared memory that a program may have."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
    "gfx950": Target(GPUTarget("hip", "gfx950", 64), 160 * 1024),
}


class Launch(NamedTuple):
    """One launch: the kernel and its name, its arguments by name, how it is compiled."""

    name: str
    kernel: Any
    given: dict[str, Any]
    options: dict[str, Any]


class Resources(NamedTuple):
    """What a compiled kernel takes. matrix: instructions of matrix units; double: instructions in float64."""

    registers: int
    spills: int
    shared: int
    threads: int
    matrix: int
    double: int


@contextmanager
def recorded(target: str, launcher: ModuleType, kernels: Iterable[str]) -> Generator[list[Launch]]:
    """Launches are listed instead of run. ``kernels`` are the names under which a launcher's module holds them."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launcher, name)
            self.arg_names = self.kernel.arg_names

        def __getitem__(self, grid: Any) -> Any:
            return self._call

        def _call(self, *args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            found.append(Launch(self.name, self.kernel, given, options))

    hip = "7.0" if TARGETS[target].gpu.backend == "hip" else None
    recorders: dict[str, Any] = {name: Recorder(name) for name in kernels}
    with patch.multiple(launcher, **recorders), patch.object(torch.version, "hip", hip):
        yield found


def compile_launch(made: Launch, target: str) -> Resources:
    """Compile what a launch would compile, and read what it takes."""
    signature: dict[str, Any] = {}
    constants: dict[_Place, Any] = {}
    attributes: dict[_Place, Any] = {}
    for i, parameter in enumerate(made.kernel.params):
        value = made.given[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)], signature[parameter.name] = value, "constexpr"
        else:
            signature[parameter.name] = _kind(value, (i,), constants, attributes)
    source = ASTSource(fn=made.kernel, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=TARGETS[target].gpu, options=made.options)
    read = _nvidia if "cubin" in found.asm else _amd
    return read(found, made.options.get("num_warps", 4) * TARGETS[target].gpu.warp_size)


def faults(found: Resources, target: str, *, matrix: bool = True) -> list[str]:
    """What keeps a kernel from its speed, or from running at all. ``matrix``: it multiplies matrices."""
    most = TARGETS[target].shared
    said = {
        f"{found.spills} accesses to spilled registers": found.spills > 0,
        f"{found.double} instructions in float64": found.double > 0,
        f"{found.shared} bytes of shared memory, {most} at most": found.shared > most,
        f"{found.threads} threads, {_THREADS} at most": found.threads > _THREADS,
        "no instruction of matrix units": matrix and not found.matrix,
    }
    return [what for what, holds in said.items() if holds]


def _kind(value: Any, path: _Place, constants: dict[_Place, Any], attributes: dict[_Place, Any]) -> Any:
    """The type of an argument, specialised as a launch specialises it."""
    if isinstance(value, tuple):
        return type(value)(*(_kind(x, (*path, i), constants, attributes) for i, x in enumerate(value)))
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if not isinstance(value, int) or value == 1:
        constants[path] = value
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32"


def _nvidia(found: Any, threads: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(found.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    matrix = len(re.findall(r"\bHG?MMA\b", code)) + len(re.findall(r"\btcgen05\.mma\b", found.asm["ptx"]))
    double = len(re.findall(r"\.f64", found.asm["ptx"]))
    return Resources(registers, spills, found.metadata.shared, threads, matrix, double)


def _amd(found: Any, threads: int) -> Resources:
    text = found.asm["amdgcn"]
    registers, spills = (int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in ("vgpr_count", "vgpr_spill_count"))
    matrix, double = len(re.findall(r"\bv_mfma", text)), len(re.findall(r"\bv_\w+_f64", text))
    return Resources(registers, spills, found.metadata.shared, threads, matrix, double)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True).stdout
