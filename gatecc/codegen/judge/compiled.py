"""What a GPU would be given, compiled for it without one, and what that takes.

``recorded`` lists the launches of a launcher that runs on tensors without data, ``compile_launch`` compiles one of them
by Triton, which brings the assemblers of both makers, and reads registers, spills and shared memory from what they
write; ``faults`` holds these against the GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
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
from triton.runtime.jit import KernelInterface

_BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_AMD_BYTES = {"dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b64": 8, "b96": 12, "b128": 16}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a launch: no arguments of the kernel
WIDE = 16  # bytes, the widest access there is
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
    """One launch: the kernel and its name, the programs, its arguments by name, how it is compiled."""

    name: str
    kernel: Any
    grid: tuple[int, ...]
    given: dict[str, Any]
    options: dict[str, Any]

    @property
    def specialised(self) -> str:
        """What decides of how it is compiled: constants by their values, numbers by what a launch looks at in them."""
        constant = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        given = sorted((name, x if name in constant else _kept(x)) for name, x in self.given.items())
        return str((self.name, sorted(self.options.items()), given))


class Resources(NamedTuple):
    """What a compiled kernel takes.

    dots: products of matrices that it asks for; matrix: instructions of matrix units; double: instructions in float64;
    vector: bytes of its widest access to global memory.
    """

    registers: int
    spills: int
    shared: int
    threads: int
    dots: int
    matrix: int
    double: int
    vector: int


@contextmanager
def recorded(target: str, launcher: ModuleType) -> Generator[list[Launch]]:
    """Launches of the kernels that a launcher's module names are listed instead of run."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launcher, name)
            self.arg_names = self.kernel.arg_names

        def __getitem__(self, grid: Any) -> Any:
            return partial(self._call, grid)

        def _call(self, grid: Any, *args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            programs: Any = grid({**given, **options}) if callable(grid) else grid
            found.append(Launch(self.name, self.kernel, tuple(programs), given, options))

    hip = "7.0" if TARGETS[target].gpu.backend == "hip" else None
    recorders: dict[str, Any] = {name: Recorder(name) for name in kernel_names(launcher)}
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


def kernel_names(launcher: ModuleType) -> list[str]:
    """The names under which a module holds kernels that are launched: not those that others among them call."""
    found = {name: _function(value) for name, value in vars(launcher).items() if isinstance(value, KernelInterface)}
    called = {name for function in found.values() for name in function.__code__.co_names}
    return [name for name in found if name not in called]


def _function(kernel: Any) -> Any:
    """What a kernel was written as, below what it is wrapped in."""
    while isinstance(kernel, KernelInterface):
        kernel = kernel.fn  # pyright: ignore[reportAttributeAccessIssue]
    return kernel


def faults(found: Resources, target: str, *, spills: float = 0, vector: float = WIDE, matrix: float = 1) -> list[str]:
    """What keeps a kernel from its speed, or from running at all, within what is allowed it.

    ``spills``: how many accesses to spilled registers it may have; ``vector``: how many bytes it must access at once;
    ``matrix``: how many instructions of matrix units it must have if it multiplies matrices.
    """
    most = TARGETS[target].shared
    said = {
        f"{found.spills} accesses to spilled registers, {spills:g} at most": found.spills > spills,
        f"{found.double} instructions in float64": found.double > 0,
        f"{found.shared} bytes of shared memory, {most} at most": found.shared > most,
        f"{found.threads} threads, {_THREADS} at most": found.threads > _THREADS,
        f"{found.matrix} instructions of matrix units": found.dots > 0 and found.matrix < matrix,
        f"{found.vector} bytes at once from global memory, {vector:g} at least": found.vector < vector,
    }
    return [what for what, holds in said.items() if holds]


def _kept(value: Any) -> Any:
    """What a launch is specialised by, of an argument."""
    if isinstance(value, tuple):
        return tuple(map(_kept, value))
    if isinstance(value, Tensor):
        return value.dtype
    kind = _kind(value, (), {}, {})
    return kind, value if kind == "constexpr" else isinstance(value, int) and value % 16 == 0


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
    text = found.asm["ptx"]
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", code))
    matrix = len(re.findall(r"\bHG?MMA\b", code)) + len(re.findall(r"\btcgen05\.mma\b", text))
    accesses = re.findall(r"\b(?:ld|st)\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)", text)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in accesses]
    widths += [int(size, 16) for size in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\], (?:0x)?(\d+)", text)]
    return Resources(
        registers,
        spills,
        found.metadata.shared,
        threads,
        len(re.findall(r"\btt\.dot\b", found.asm["ttir"])),
        matrix,
        len(re.findall(r"\.f64", text)),
        max(widths, default=0),
    )


def _amd(found: Any, threads: int) -> Resources:
    text = found.asm["amdgcn"]
    registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
    # Not vgpr_spill_count, which also counts what is moved to accumulation registers: that is no access to memory.
    spills = len(re.findall(r"\bscratch_(?:load|store)_", text))
    accesses = re.findall(r"\b(?:global|buffer)_(?:load|store)_(?:lds_)?(\w+)", text)
    return Resources(
        registers,
        spills,
        found.metadata.shared,
        threads,
        len(re.findall(r"\btt\.dot\b", found.asm["ttir"])),
        len(re.findall(r"\bv_mfma", text)),
        len(re.findall(r"\bv_\w+_f64", text)),
        max((_AMD_BYTES.get(kind, 4 if "dword" in kind else 2) for kind in accesses), default=0),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True).stdout
