"""Building C: once per source, whole files only, any number of processes, and what happens without a compiler."""

from __future__ import annotations

import ctypes
import logging
import platform
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import gatecc
from gatecc.codegen.c import build
from gatecc.ops.linear_attention import linear_attention
from gatecc.ops.linear_attention.c.kernels import Spec, library
from tests.machine import units
from tests.ops.linear_attention.cases import double, operands, relative

ROOT = Path(gatecc.__file__).parent
SOURCE = "int answer(void) { return 42; }"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GATECC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def answer(found: ctypes.CDLL | None) -> int:
    assert found is not None
    return found.answer()


def test_a_source_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(build.load(SOURCE)) == 42
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(build, "compile_c", lambda *_: pytest.fail("built again"))
    assert answer(build.load(SOURCE)) == 42


def test_another_source_is_another_library(cache: Path) -> None:
    assert answer(build.load(SOURCE)) == 42
    assert answer(build.load(SOURCE.replace("42", "43"))) == 43
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_library_is_built_again(cache: Path) -> None:
    build.load(SOURCE)
    # Another inode, as a crash would leave it: a file that is mapped here must not change.
    (path,) = cache.iterdir()
    path.unlink()
    path.write_bytes(b"\x7fELF")
    assert answer(build.load(SOURCE)) == 42


def test_processes_at_once(cache: Path) -> None:
    # The two packages without what they import: torch takes seconds, and then nothing would happen at once.
    code = textwrap.dedent(f"""
        import sys, types
        for name, folder in (("gatecc", {str(ROOT)!r}), ("gatecc.ir", {str(ROOT / "ir")!r})):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [folder]
        from gatecc.codegen.c import build
        assert build.load({SOURCE!r}).answer() == 42
        assert "torch" not in sys.modules
    """)
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GATECC_CACHE", str(tmp_path / "file" / "cache"))
    assert answer(build.load(SOURCE)) == 42


@pytest.mark.usefixtures("cache")
def test_flags_that_a_compiler_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", (("-mno-such-flag",), ("-pthread",)))
    assert answer(build.load(SOURCE)) == 42


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("flags", [("-pthread",), ("-mavx2", "-mfma", "-pthread")])
def test_narrower_vectors(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable build and that for AVX2, threads made for the call."""
    monkeypatch.setattr(build, "FLAGS", (flags,))
    library.cache_clear()
    torch.set_num_threads(2)
    try:
        for rule in ("gated", "gated_delta"):
            inputs = operands(rule, N=70, Dk=9, Dv=20, kind="mixed")
            assert relative(linear_attention(**inputs)[0], linear_attention(**double(inputs))[0]) < 1e-5
            assert library(Spec("forward", True, "delta" in rule, 9, 20)) is not None
    finally:
        torch.set_num_threads(1)
        library.cache_clear()


# What a compiler is told for each unit, whatever this machine has.
MACHINES = {
    "AVX2": ("-march=haswell",),
    "AVX-512": ("-march=skylake-avx512",),
    "AVX-512 bf16": ("-march=cooperlake",),
    "AMX": ("-march=sapphirerapids",),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these units are those of x86_64")
@pytest.mark.parametrize("unit", MACHINES)
def test_code_for_every_unit_compiles(unit: str) -> None:
    """Also for the units that this machine lacks: their code is compiled and not run here, and the run says so."""
    compiler = build.find_compiler()
    assert compiler is not None
    for spec in (
        Spec("forward", True, True, 64, 64),
        Spec("backward", True, True, 64, 64),
        Spec("tiles", True, False, 64, 64),
    ):
        assert build.compile_c(spec.source(), compiler, (*MACHINES[unit], "-fopenmp")) is not None, spec.part
    if unit not in units():
        warnings.warn(f"compiled, not run: this CPU has no {unit}", stacklevel=1)


@pytest.mark.usefixtures("cache")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    library.cache_clear()
    build.say_once.cache_clear()
    inputs = operands("gated_delta", N=70, Dk=6, Dv=7)
    try:
        with caplog.at_level(logging.WARNING, "gatecc"):
            for _ in range(2):
                assert relative(linear_attention(**inputs)[0], linear_attention(**double(inputs))[0]) < 1e-5
            library.cache_clear()
            linear_attention(**inputs)
    finally:
        library.cache_clear()
    assert len(caplog.records) == 1
    assert "no C compiler was found" in caplog.text
