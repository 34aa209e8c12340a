"""doctor: what is installed, what of it gatecc can use, and what is in the way."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata, util
from typing import Literal

import torch
from torch.torch_version import TorchVersion

from gatecc.ops import registry

State = Literal["ok", "missing", "conflict"]
TORCH = "2.13"  # the oldest that gatecc supports

_PACKAGES = {
    "gatecc": "",
    "torch": "",
    "triton": "GPU kernels; comes with torch on Linux",
    "transformers": "Hugging Face models: pip install 'gatecc[hf]'",
    "onnx": "export: pip install 'gatecc[onnx]'",
    "onnxscript": "export: pip install 'gatecc[onnx]'",
    "onnx-ir": "export: pip install 'gatecc[onnx]'",
}
_RUNTIME = "onnxruntime"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; ``found`` is a version or a place, ``remark`` what it is for or what to do."""

    name: str
    state: State
    found: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Packages, tools and abilities of this machine."""

    installed: tuple[Finding, ...]
    usable: tuple[Finding, ...]

    @property
    def conflicts(self) -> tuple[Finding, ...]:
        return tuple(f for f in (*self.installed, *self.usable) if f.state == "conflict")


def diagnose() -> Diagnosis:
    """Look at the running interpreter; nothing is changed or fetched."""
    return Diagnosis(tuple(_installed()), tuple(_usable()))


def _installed() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version(), f"{platform.system()} {platform.machine()}")
    for package, purpose in _PACKAGES.items():
        version = _version(package)
        if package == "torch" and TorchVersion(torch.__version__) < TORCH:
            yield Finding(package, "conflict", torch.__version__, f"gatecc needs torch {TORCH} or later")
        else:
            yield Finding(package, "ok" if version else "missing", version, "" if version else purpose)
    yield _runtime(metadata.packages_distributions().get(_RUNTIME, []))


def _runtime(owners: list[str]) -> Finding:
    """ONNX Runtime's builds all own the import name ``onnxruntime``: the one installed last overwrites the others."""
    builds = sorted(set(owners))
    if len(builds) > 1:
        remedy = f"pip uninstall -y {' '.join(builds)}, then install one of them"
        return Finding(_RUNTIME, "conflict", ", ".join(builds), f"these overwrite each other: {remedy}")
    if not builds:
        return Finding(
            _RUNTIME, "missing", "", "checks exported models: pip install 'gatecc[ort]' or 'gatecc[ort-gpu]'"
        )
    return Finding(builds[0], "ok", _version(builds[0]))


def _usable() -> Iterator[Finding]:
    yield Finding("ATen operators", "ok", "every device", "the reference that all kernels are judged against")
    for operator in registry.operators():
        if operator.kernels:
            name = operator.overload.overloadpacket._qualified_op_name
            yield Finding(f"kernels of {name}", "ok", ", ".join(sorted(operator.kernels)))
    yield _compiler(
        "C compiler", os.environ.get("CC"), ("cc", "gcc", "clang"), "operators run in ATen on the CPU without it"
    )
    yield _compiler(
        "C++ compiler", os.environ.get("CXX"), ("c++", "g++", "clang++"), "torch.compile on the CPU needs it"
    )
    yield _gpu()
    yield _triton()
    missing = [name for name in ("onnx", "onnxscript", _RUNTIME) if util.find_spec(name) is None]
    remark = f"needs {', '.join(missing)}: pip install 'gatecc[onnx,ort]'" if missing else ""
    yield Finding("ONNX export", "missing" if missing else "ok", "", remark)


def _compiler(name: str, chosen: str | None, usual: tuple[str, ...], purpose: str) -> Finding:
    """The compiler that a build would take: the one that the environment names, else the first usual one."""
    names = (chosen.split()[0],) if chosen and chosen.split() else usual
    place = next((place for place in map(shutil.which, names) if place), None)
    if place is None and chosen:
        return Finding(name, "conflict", chosen, "the environment names a compiler that does not exist")
    return Finding(name, "ok" if place else "missing", place or "", "" if place else purpose)


def _gpu() -> Finding:
    built = f"torch was built for {torch.version.cuda or torch.version.hip or 'the CPU'}"
    if not torch.cuda.is_available():
        return Finding("GPU", "missing", "", built)
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    known = torch.cuda.get_arch_list()
    if known and not any(arch.split("_")[-1].startswith(str(major)) for arch in known):
        return Finding("GPU", "conflict", name, f"this torch has no code for it, only for {', '.join(known)}")
    return Finding("GPU", "ok", name, built)


def _triton() -> Finding:
    if util.find_spec("triton") is None:
        return Finding("Triton kernels", "missing", "", "triton is not installed; kernels run as ATen")
    if torch.cuda.is_available():
        return Finding("Triton kernels", "ok", "on the GPU")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding("Triton kernels", "ok", "interpreter", "correct but slow: for tests")
    return Finding("Triton kernels", "missing", "", "no GPU; TRITON_INTERPRET=1 runs them for tests")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
