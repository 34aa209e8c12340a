"""Packages: what an export needs beyond gatecc's own dependencies, and which extra brings it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from gatecc.errors import MissingPackageError

EXPORT = ("onnx", "onnxscript", "onnx_ir")
RUNTIME = ("onnxruntime",)
_DISTRIBUTIONS = {"onnx_ir": ("onnx-ir",), "onnxruntime": ("onnxruntime", "onnxruntime-gpu")}


def need(*names: str) -> None:
    """Raise MissingPackageError if one of these modules cannot be imported."""
    missing: list[str] = []
    for name in names:
        try:
            import_module(name)
        except ImportError as e:
            missing.append(f"{name} ({e})")
    if missing:
        raise MissingPackageError(
            "packages for the ONNX export are missing",
            found="; ".join(missing),
            do="pip install 'gatecc[onnx,ort]' (or 'gatecc[onnx,ort-gpu]', never both); "
            "verify=False exports uncompared, without ONNX Runtime",
        )


def versions(*names: str) -> dict[str, str]:
    """The installed versions of those modules that are installed."""
    found: dict[str, str] = {}
    for name in names:
        for distribution in _DISTRIBUTIONS.get(name, (name,)):
            try:
                found[distribution] = version(distribution)
            except PackageNotFoundError:
                continue
    return found
