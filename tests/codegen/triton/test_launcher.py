"""Launchers: Triton waits for the first tensor on a GPU, and what is missing is said once."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch

from gatecc.codegen.notice import say_once
from gatecc.codegen.triton.launcher import Launcher

CUDA = torch.device("cuda", 0)


def launcher(module: str = "math") -> Launcher:
    return Launcher(module, "roots are taken")


def test_it_calls_the_module() -> None:
    assert launcher().run("sqrt", None, 9.0) == 3.0


def test_the_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "gatecc"):
        assert launcher().run("sqrt", "9 is odd", 9.0) is None
        assert launcher().run("sqrt", "9 is odd", 9.0) is None
        assert launcher().run("sqrt", "it is a secret", 9.0, quiet=True) is None
    assert [r.message for r in caplog.records] == ["roots are taken in ATen and not by a GPU kernel: 9 is odd"]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    found = launcher("tests.codegen.judge.kernels")
    monkeypatch.delitem(sys.modules, "tests.codegen.judge.kernels", raising=False)
    assert "Triton cannot be imported" in str(found.missing(CUDA))
    assert "Triton cannot be imported" in str(found.missing(torch.device("cpu")))


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    for capability, reason in (((7, 0), "Tesla V100 is older than the kernels ask for"), ((8, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert launcher().missing(CUDA) == reason


def test_triton_waits_for_the_first_tensor_on_a_gpu() -> None:
    """No launcher is imported with gatecc, nor what the judge knows of them."""
    code = "import sys, gatecc; print([n for n in sys.modules if n.endswith(('triton.launch', '.judged'))])"
    run: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
