"""Each header of the kernels opens alone: it includes what it needs, on machines with and without wide vectors."""

from __future__ import annotations

import platform
import subprocess

import pytest

from gatecc.codegen.c.build import COMMON, find_compiler
from gatecc.ops.linear_attention.c.kernels import HEADERS, ROOTS

STRICT = ("-fsyntax-only", "-Werror=implicit-function-declaration", "-Werror=undef")
MACHINES = ("haswell", "sapphirerapids") if platform.machine() == "x86_64" else (None,)


@pytest.mark.parametrize("machine", MACHINES)
def test_each_header_opens_alone(machine: str | None) -> None:
    compiler = find_compiler()
    assert compiler is not None
    headers = sorted(map(str, HEADERS.glob("*.h")))
    flags = () if machine is None else (f"-march={machine}",)
    command = [compiler, *COMMON, *flags, *STRICT, "-x", "c", *headers]  # one run, a translation unit for each
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert {f"{root}.h" for roots in ROOTS.values() for root in roots} <= {path.name for path in HEADERS.glob("*.h")}
