"""Place: which operator of the model an error of torch's exporters is about, in which module, at which line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import fx
from torch._ops import OpOverload

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_RAW = re.compile(r"\x1b\[[0-9;]*m")
_TORCH = ("/torch/", "/gatecc/scope/", "/gatecc/codegen/", "/gatecc/ops/")


def place(node: fx.Node) -> str:
    """``model.layers.0.mlp, modeling_x.py:212: aten.name``, as much of it as is known."""
    stack = node.meta.get("nn_module_stack") or {}
    owner = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    owner = owner.removeprefix("m.") if owner != "m" else ""
    where = ", ".join(part for part in (owner, _line(node.meta.get("stack_trace"))) if part)
    return f"{where}: {operator(node)}" if where else operator(node)


def operator(node: fx.Node) -> str:
    """The name of what a node calls; of an operator that torch has wrapped (one that writes to its inputs) its own."""
    target = node.args[0] if node.args and isinstance(node.args[0], OpOverload) else node.target
    schema = getattr(target, "_schema", None)
    if schema is not None and schema.name.startswith("onnx_symbolic::"):  # a node of ONNX that a lowering has written
        return f"{node.kwargs.get('domain') or 'onnx'}.{node.args[1]}"
    return schema.name.replace("::", ".") if schema is not None else getattr(target, "__name__", str(target))


def blame(error: BaseException) -> dict[str, str]:
    """``where`` and ``found`` of a GateccError: the node that the exporter was at, and its innermost complaint."""
    causes = list(_causes(error))
    node = next((n for e in reversed(causes) if (n := _node(e)) is not None), None)
    root = causes[-1]
    return {"where": "" if node is None else place(node), "found": f"{type(root).__name__}: {first_line(root)}"}


def reason(error: BaseException) -> str:
    """The first telling line of torch's message, and the model's own line where one is named."""
    line = _line(str(error))
    return f"{type(error).__name__}: {first_line(error)}" + (f" ({line})" if line else "")


def first_line(error: BaseException) -> str:
    """The first line of a message that is not empty."""
    lines = [line.strip() for line in _RAW.sub("", str(error)).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, its cause, the cause of that, ..."""
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__


def _node(error: BaseException) -> fx.Node | None:
    """The graph node that the innermost frame of the traceback works on."""
    found: fx.Node | None = None
    trace = error.__traceback__
    while trace is not None:
        candidate = trace.tb_frame.f_locals.get("node") or trace.tb_frame.f_locals.get("n")
        if isinstance(candidate, fx.Node) and candidate.op == "call_function":
            found = candidate
        trace = trace.tb_next
    return found


def _line(trace: str | None) -> str:
    """File and line of the model's own innermost frame; code that a compiler has written is in no file."""
    frames = [f for f in _FRAME.findall(trace or "") if not f[0].startswith("<")]
    own = [f for f in frames if not any(part in f[0] for part in _TORCH)] or frames
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""
