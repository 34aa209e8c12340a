"""A C source as a loaded library: compiled once per source, compiler, flags and CPU, and kept in a folder.

The folder is ``$GATECC_CACHE``, else ``gatecc`` in the user's cache. Builds may run at once: each writes a file of its
own and moves it into place, and whoever comes last replaces a library by its equal.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from gatecc.codegen.notice import LOG, say_once
from gatecc.ir.files import write_atomic

COMMON = ("-std=gnu11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# The best first; a compiler that does not know a flag gets the next.
FLAGS = (("-march=native", "-fopenmp"), ("-march=native", "-pthread"), ("-mcpu=native", "-pthread"), ("-pthread",))
SECONDS = 120


def load(source: str) -> ctypes.CDLL | None:
    """The library of a source, or None if no compiler makes one; the log says why, once."""
    compiler = find_compiler()
    if compiler is None:
        say_once("no C compiler was found: operators run in ATen, several times slower (set CC to mend it)")
        return None
    for flags in FLAGS:
        library = _load(source, compiler, flags)
        if library is not None:
            return library
    say_once(f"{compiler} does not compile gatecc's kernels: operators run in ATen, several times slower")
    return None


def find_compiler() -> str | None:
    """The C compiler: ``$CC``, else the first of cc, gcc and clang on the path."""
    chosen = os.environ.get("CC")
    names = (chosen,) if chosen is not None else ("cc", "gcc", "clang")
    return next((path for path in map(shutil.which, names) if path), None)


def folder() -> Path:
    """Where libraries are kept."""
    chosen = os.environ.get("GATECC_CACHE")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{cache}/gatecc").expanduser()


def _load(source: str, compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    key = "\0".join((source, _version(compiler), *COMMON, *flags, _cpu()))
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    try:
        return ctypes.CDLL(str(folder() / name))
    except OSError:
        pass  # not built yet, or by a disk that was full
    binary = compile_c(source, compiler, flags)
    if binary is None:
        return None
    try:
        return ctypes.CDLL(str(write_atomic(folder() / name, binary)))
    except OSError as error:  # a home without write permission
        LOG.info("kernels are not kept: %s", error)
        return ctypes.CDLL(str(write_atomic(_private() / name, binary)))


def compile_c(source: str, compiler: str, flags: tuple[str, ...]) -> bytes | None:
    """The shared library that a compiler makes of a source, or None if it refuses."""
    with tempfile.TemporaryDirectory(prefix="gatecc-") as place:
        text, binary = Path(place, "kernel.c"), Path(place, "kernel.so")
        text.write_text(source)
        command = [compiler, *COMMON, *flags, str(text), "-o", str(binary), "-lm"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            LOG.info("%s: %s", compiler, error)
            return None
        if run.returncode:
            LOG.info("%s refuses %s: %s", compiler, " ".join(flags), run.stderr[:2000])
            return None
        return binary.read_bytes()


@lru_cache
def _version(compiler: str) -> str:
    run = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False)
    return compiler + run.stdout


@lru_cache
def _cpu() -> str:
    """What -march=native stands for here: a shared home may be read by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    words = ("flags", "Features", "model name", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(words)}))


@lru_cache
def _private() -> Path:
    return Path(tempfile.mkdtemp(prefix="gatecc-kernels-"))
