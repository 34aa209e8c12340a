"""Runtime: an exported file checked by ONNX's own checker and run in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gatecc.errors import ExportError

_NO_KERNELS = (torch.bfloat16, torch.complex64, torch.complex128)


def check(path: Path) -> None:
    """The full check, with shape inference, by path (in memory it ends at 2 GiB). Raises ExportError."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as e:
        raise ExportError("ONNX's checker rejects the graph", found=f"{type(e).__name__}: {e}") from e


class Session:
    """A file in ONNX Runtime on the CPU. Raises ExportError if it cannot be loaded or run."""

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails raises
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:
            raise ExportError("ONNX Runtime does not load the graph", found=f"{type(e).__name__}: {e}") from e
        self._inputs = {i.name for i in self._session.get_inputs()}

    def run(self, names: Sequence[str], leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for these inputs, on the CPU."""
        feeds = {n: x.detach().cpu().numpy() for n, x in zip(names, leaves, strict=True) if n in self._inputs}
        try:
            return [torch.from_numpy(y) for y in self._session.run(None, feeds)]
        except Exception as e:
            sizes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(names, leaves, strict=True))
            raise ExportError("the graph fails in ONNX Runtime", where=sizes, found=f"{type(e).__name__}: {e}") from e


def check_dtypes(tensors: Sequence[torch.Tensor]) -> None:
    """Raise ExportError for dtypes that ONNX Runtime cannot compute with on a CPU."""
    for dtype in {t.dtype for t in tensors} & set(_NO_KERNELS):
        raise ExportError(
            "ONNX Runtime has no kernels on the CPU for this dtype",
            found=str(dtype),
            expected="float32, float64 or float16",
            do="export model.float(); or verify=False to write the graph uncompared",
        )
