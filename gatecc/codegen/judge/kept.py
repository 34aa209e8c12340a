"""What compiled kernels take, kept in the user's cache: a kernel is compiled once for its constants and a target.

Whoever changes its source, Triton, an assembler or what is read of a binary compiles it anew. A check that was
interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.compiler import make_backend

from gatecc.codegen.c.build import folder
from gatecc.codegen.judge import compiled
from gatecc.codegen.judge.compiled import TARGETS, Launch, Resources, compile_launch
from gatecc.ir.files import write_atomic


def resources(made: Launch, target: str) -> Resources:
    """What a launch takes on a target, compiled if it is not known. Raises whatever a compiler does."""
    path = _place(made, target)
    with suppress(OSError, ValueError, TypeError):  # not there, or another's
        return Resources(**json.loads(path.read_text(encoding="utf-8")))
    found = compile_launch(made, target)
    with suppress(OSError):  # a home without write permission
        write_atomic(path, json.dumps(found._asdict()))
    return found


def _place(made: Launch, target: str) -> Path:
    """``cache_key``: Triton's hash of a kernel's source and of all that it calls."""
    key = "\0".join((_tools(target), target, made.kernel.cache_key, made.specialised))
    return folder() / "judge" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


@cache
def _tools(target: str) -> str:
    """The compilers, and how their binaries are read."""
    backend: Any = make_backend(TARGETS[target].gpu)
    return "\0".join((triton.__version__, str(backend.hash()), Path(compiled.__file__).read_text(encoding="utf-8")))
