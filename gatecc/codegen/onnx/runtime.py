"""Runtime: an exported file checked by ONNX's own checker and run in ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from gatecc.codegen.onnx.opset import FREELY_LOADED
from gatecc.codegen.onnx.packages import RUNTIME, has, versions
from gatecc.codegen.onnx.place import first_line
from gatecc.codegen.onnx.worker import Apart, Ends, RaisedThereError, Worker
from gatecc.errors import ExportError, MissingPackageError

_NAME = re.compile(r"[\w.:/-]+")
_UNFOLDED = {"Erf": ("Gelu",), "Softplus": ("Mish",), "Tanh": ("Gelu", "Mish"), "Sigmoid": ("Swish",)}
_LACKS = re.compile(r"implementation for (\w+)\(")
_OTHER = "write it with other operators; verify=False writes the graph untried"
_NO_RUNTIME = "pip install 'gatecc[ort]'; target='portable' needs none; verify=False writes the graph untried"
_REPORT = "gatecc did not foresee this: please report it with the model's code; another opset may do"
_NO_COPIES = {"session.disable_prepacking": "1"}  # of weights, laid out for the kernels
_NO_KERNELS = (torch.bfloat16, torch.complex64, torch.complex128)


def check(path: Path, places: Mapping[str, str], *, apart: bool = False) -> None:
    """The full check, with shape inference; ``apart`` in a process of its own. Raises ExportError.

    ``places`` says of the graph's nodes, by name, which operator of the model they come from.
    """
    with closing(Apart() if apart else Worker()) as worker:
        try:
            worker.check(str(path))
        except Exception as e:
            raise ExportError("ONNX's checker rejects the graph", **_blame(e, places), do=_REPORT) from e


class Session:
    """A file in ONNX Runtime on the CPU; ``apart`` in a process of its own. Raises ExportError if it cannot be loaded
    or run. ``names`` are those of the outputs; these ``values`` inside the graph are among them."""

    def __init__(
        self, path: Path, places: Mapping[str, str], *, apart: bool = False, values: Sequence[str] = ()
    ) -> None:
        self.lacking = "" if has(*RUNTIME) else "onnxruntime is missing"
        """Why ONNX's reference evaluator stands in for ONNX Runtime; "" if it does not."""
        self._worker = Apart() if apart and not self.lacking else Worker()
        self._places = places
        try:
            self._inputs, self.names = self._load(path, _NO_COPIES if apart else {}, values)
        except ExportError:
            self.close()
            raise
        except Exception as e:
            self.close()
            raise MissingPackageError(
                "without ONNX Runtime this graph cannot be compared", found=first_line(e), do=_NO_RUNTIME
            ) from e

    def _load(self, path: Path, settings: Mapping[str, str], values: Sequence[str]) -> Ends:
        if not self.lacking:
            try:
                return self._worker.load(str(path), settings, values)
            except Exception as e:
                told = _blame(e, self._places)
                told["where"] = told["where"] or _unfolded(path, e, self._places)
                if (opset := _opset(path)) <= FREELY_LOADED:
                    raise ExportError("ONNX Runtime does not load the graph", **told, do=_OTHER) from e
                known = " ".join(f"{name} {number}" for name, number in versions(*RUNTIME).items())
                self.lacking = f"{known} does not load opset {opset} ({told['found']})"
        return self._worker.evaluate(str(path), values)

    def run(self, names: Sequence[str], leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for these inputs, on the CPU."""
        feeds = {n: x.detach().cpu().numpy() for n, x in zip(names, leaves, strict=True) if n in self._inputs}
        try:
            return [torch.from_numpy(y) for y in self._worker.run(feeds)]
        except Exception as e:
            sizes = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(names, leaves, strict=True))
            told = _blame(e, self._places)
            where = ", ".join(part for part in (told["where"], sizes) if part)
            raise ExportError("the graph fails in ONNX Runtime", where=where, found=told["found"], do=_OTHER) from e

    def close(self) -> None:
        """Let go of the file, and end the process."""
        self._worker.close()


def _blame(error: Exception, places: Mapping[str, str]) -> dict[str, str]:
    """``where`` and ``found``: the operator of the model whose node a message names."""
    named = next((places[name] for name in _NAME.findall(str(error)) if name in places), "")
    kind = error.kind if isinstance(error, RaisedThereError) else type(error).__name__
    return {"where": named, "found": f"{kind}: {first_line(error)}"}


def _unfolded(path: Path, error: Exception, places: Mapping[str, str]) -> str:
    """The operator of the model whose node ONNX Runtime unfolded into one that it lacks, and which has no name: Erf of
    Gelu."""
    import onnx

    if not (lacking := _LACKS.search(str(error))):
        return ""
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type in (lacking[1], *_UNFOLDED.get(lacking[1], ())):
            return places.get(node.name, "")
    return ""


def _opset(path: Path) -> int:
    import onnx

    imports = onnx.load(path, load_external_data=False).opset_import
    return next((i.version for i in imports if not i.domain), 0)


def check_dtypes(tensors: Sequence[torch.Tensor]) -> None:
    """Raise ExportError for dtypes that ONNX Runtime cannot compute with on a CPU."""
    for dtype in {t.dtype for t in tensors} & set(_NO_KERNELS):
        raise ExportError(
            "ONNX Runtime has no kernels on the CPU for this dtype",
            found=str(dtype),
            expected="float32, float64 or float16",
            do="export model.float(); or verify=False to write the graph uncompared",
        )
