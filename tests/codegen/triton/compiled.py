"""What a GPU would be given, compiled for it without one: ``python -m tests.codegen.triton.compiled`` prints it all.

Words after it choose: ``sm_90 gated bfloat16 64``.

The launcher runs on tensors without data; each launch is recorded and compiled by Triton, which brings the
assemblers of both makers. Registers, spills and shared memory are read from what they write.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gatecc.ops.linear_attention.arguments import arguments
from gatecc.ops.linear_attention.problem import prepare
from gatecc.ops.linear_attention.triton import launch

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
KERNELS = ("scan", "mix", "differentiate", "solve", "strengths", "delta_scan", "delta_scan_backward")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


Place = tuple[int, ...]  # of an argument, or of a field of one


class Target(NamedTuple):
    """A GPU. shared: bytes of shared memory that a program may have."""

    gpu: GPUTarget
    shared: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Launch(NamedTuple):
    """One launch: the kernel's name, its arguments by name, how it is compiled."""

    name: str
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


def launches(target: str, rule: str, dtype: torch.dtype, D: int = 64, *, per_head: bool = False) -> list[Launch]:
    """All launches of forward and backward, of each kernel one for each set of constants."""

    def on_meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    decay = on_meta(1, 4, 64, 1 if per_head else D) if "gated" in rule else None
    beta = on_meta(1, 4, 64) if "delta" in rule else None
    q, k, v = (on_meta(1, 4, 64, D) for _ in range(3))
    a = arguments(q, k, v, decay, beta, gate_normalizer=None if decay is None else 16.0)
    with recorded(target) as found:
        launch.forward(prepare(a))
        state = torch.empty(1, 4, D, D, device="meta")
        launch.backward(prepare(a), on_meta(1, 4, 64, D), state)
    return list({str((x.name, x.given)): x for x in found}.values())


@contextmanager
def recorded(target: str) -> Generator[list[Launch]]:
    """Launches are listed instead of run."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name, self.arg_names = name, getattr(launch, name).arg_names

        def __getitem__(self, grid: Any) -> Any:
            return self._call

        def _call(self, *args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")}
            found.append(Launch(self.name, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    hip = "7.0" if TARGETS[target].gpu.backend == "hip" else None
    recorders: dict[str, Any] = {name: Recorder(name) for name in KERNELS}
    with patch.multiple(launch, **recorders), patch.object(torch.version, "hip", hip):
        yield found


def compile_launch(made: Launch, target: str) -> Resources:
    """Compile what a launch would compile, and read what it takes."""
    kernel = getattr(launch, made.name)
    signature: dict[str, Any] = {}
    constants: dict[Place, Any] = {}
    attributes: dict[Place, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = made.given[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)], signature[parameter.name] = value, "constexpr"
        else:
            signature[parameter.name] = _kind(value, (i,), constants, attributes)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    found = triton.compile(source, target=TARGETS[target].gpu, options=made.options)
    read = _nvidia if "cubin" in found.asm else _amd
    return read(found, made.options["num_warps"] * TARGETS[target].gpu.warp_size)


def _kind(value: Any, path: Place, constants: dict[Place, Any], attributes: dict[Place, Any]) -> Any:
    """The type of an argument, specialised as a launch specialises it."""
    if isinstance(value, tuple):
        return type(value)(*(_kind(x, (*path, i), constants, attributes) for i, x in enumerate(value)))
    if isinstance(value, Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
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
    matrix = len(re.findall(r"\bHG?MMA\b", code))
    double = len(re.findall(r"\.f64", found.asm["ptx"]))
    return Resources(registers, spills, found.metadata.shared, threads, matrix, double)


def _amd(found: Any, threads: int) -> Resources:
    text = found.asm["amdgcn"]
    registers, spills = (int(re.findall(rf"\.{key}:\s+(\d+)", text)[0]) for key in ("vgpr_count", "vgpr_spill_count"))
    matrix, double = len(re.findall(r"\bv_mfma", text)), len(re.findall(r"\bv_\w+_f64", text))
    return Resources(registers, spills, found.metadata.shared, threads, matrix, double)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(BIN / name), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    print(f"{'target':8}{'rule':13}{'dtype':10}{'D':>4} {'kernel':20}", *(f"{name:>9}" for name in Resources._fields))
    dtypes, rules = (torch.bfloat16, torch.float32), ("gated", "gated_delta", "linear", "delta")
    for target, rule, dtype, D in product(TARGETS, rules, dtypes, (64, 128, 256)):
        if not set(sys.argv[1:]) <= {target, rule, str(dtype)[6:], str(D)}:
            continue
        for made in launches(target, rule, dtype, D):
            found = compile_launch(made, target)
            bad = "  <-" if found.spills or found.double or found.shared > TARGETS[target].shared else ""
            head = f"{target:8}{rule:13}{str(dtype)[6:]:10}{D:>4} {made.name:20}"
            print(head, *(f"{x:>9}" for x in found), bad, flush=True)


if __name__ == "__main__":
    main()
