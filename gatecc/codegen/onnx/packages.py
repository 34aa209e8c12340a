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


def has(*names: str) -> bool:
    """Whether these modules can be imported."""
    try:
        for name in names:
            import_module(name)
    except ImportError:
        return False
    return True


def need_opset(opset: int) -> None:
    """Raise MissingPackageError if the installed onnx does not know an opset yet."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if newest < opset:
        raise MissingPackageError(
            f"the installed onnx does not know opset {opset}",
            found=f"onnx {onnx.__version__}, up to opset {newest}",
            do="pip install --upgrade onnx; target='portable' needs no newer one",
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
