"""Each header of the kernels opens alone, in both dtypes, on machines with and without wide vectors and bfloat16."""

from __future__ import annotations

import platform
import subprocess

import pytest

from gatecc.codegen.c.build import COMMON, find_compiler
from gatecc.ops.attention.c.kernels import HEADERS

STRICT = ("-fsyntax-only", "-Werror=implicit-function-declaration", "-Werror=undef", "-Wall", "-Wno-unused-function")
MACHINES = ("haswell", "skylake-avx512", "sapphirerapids") if platform.machine() == "x86_64" else (None,)


@pytest.mark.parametrize("bf16", [0, 1])
@pytest.mark.parametrize("machine", MACHINES)
def test_each_header_opens_alone(machine: str | None, bf16: int) -> None:
    compiler = find_compiler()
    assert compiler is not None
    headers = sorted(map(str, HEADERS.glob("*.h")))
    flags = (f"-DBF16={bf16}", *(() if machine is None else (f"-march={machine}",)))
    command = [compiler, *COMMON, *flags, *STRICT, "-x", "c", *headers]  # one run, a translation unit for each
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
