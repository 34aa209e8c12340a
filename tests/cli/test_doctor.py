from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gatecc.cli import doctor
from gatecc.cli.doctor import Finding, diagnose


def named(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_what_is_installed_has_its_version() -> None:
    found = named(diagnose().installed)
    assert found["torch"] == Finding("torch", "ok", found["torch"].found)
    assert torch.__version__.startswith(found["torch"].found)
    assert found["gatecc"].state == "ok"


def test_kernels_are_those_of_the_registry() -> None:
    found = named(diagnose().usable)["kernels of gatecc::linear_attention"]
    assert found == Finding("kernels of gatecc::linear_attention", "ok", "cpu, cuda")


def test_both_builds_of_onnxruntime_conflict() -> None:
    finding = doctor._runtime(["onnxruntime-gpu", "onnxruntime", "onnxruntime"])
    assert finding.state == "conflict"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in finding.remark
    assert doctor._runtime([]).state == "missing"


def test_an_old_torch_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TORCH", "99.0")
    assert [finding.name for finding in diagnose().conflicts] == ["torch"]


def test_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "mycc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._compiler("C compiler", "mycc -O2", ("cc",), "") == Finding("C compiler", "ok", str(compiler))
    assert doctor._compiler("C compiler", None, ("cc",), "why").remark == "why"
    assert doctor._compiler("C compiler", "nowhere", ("mycc",), "").state == "conflict"


def test_triton_without_a_gpu_runs_only_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: object())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert doctor._triton().state == "missing"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert doctor._triton() == Finding("Triton kernels", "ok", "interpreter", "correct but slow: for tests")


def test_a_gpu_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (3, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    assert doctor._gpu().state == "conflict"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert doctor._gpu().state == "ok"


def test_export_names_what_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    (export,) = [finding for finding in diagnose().usable if finding.name == "ONNX export"]
    assert export.state == "missing"
    assert "onnxscript" in export.remark
