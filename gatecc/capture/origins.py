"""Origins of captured nodes: owner, index of the call and source line, written in the order of the nodes."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import fx

from gatecc.ir.program import META, Origin

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_RUNTIME = "_empty_nn_module_stack"  # the owner that export gives to the nodes of its own runtime asserts
_OURS = str(Path(__file__).parent)


def module_stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """The modules that ran a node, the innermost last, as torch recorded them: a key for each call, path and class."""
    return node.meta.get("nn_module_stack", {})


class OriginWriter:
    """Writes origins. The calls of an owner are told apart by their keys: a second call has "@1" in its key."""

    def __init__(self) -> None:
        self._calls: dict[str, list[str]] = {}

    def write(self, node: fx.Node, owner: str) -> None:
        """Write the origin of the next node."""
        key = "/".join(map(str, module_stack(node)))
        seen = self._calls.setdefault(owner, [])
        if node.op == "call_function" and key and key not in seen and _RUNTIME not in key:
            seen.append(key)
        call = seen.index(key) if key in seen else 0
        node.meta[META] = Origin(owner, call, _line(node.meta.get("stack_trace")))


def model_line(text: str) -> str:
    """``modeling_llama.py:257``: the innermost frame outside of torch that a text names; empty without one."""
    frames = [frame for frame in _FRAME.findall(text) if "/torch/" not in frame[0]]
    return _short(*frames[-1]) if frames else ""


def raised_at(error: BaseException) -> str:
    """``modeling_llama.py:257``: the innermost frame outside of torch and gatecc that an error came through."""
    return _innermost((f.filename, str(f.lineno)) for f in traceback.extract_tb(error.__traceback__))


def running_line() -> str:
    """``modeling_llama.py:257``: the line outside of torch and gatecc's captures that runs now."""
    return _innermost((f.filename, str(f.lineno)) for f in traceback.extract_stack())


def _innermost(frames: Iterable[tuple[str, str]]) -> str:
    own = [frame for frame in frames if "/torch/" not in frame[0] and not frame[0].startswith(_OURS)]
    return _short(*own[-1]) if own else ""


def _line(trace: str | None) -> str:
    frames = [frame for frame in _FRAME.findall(trace or "") if not frame[0].startswith(_OURS)]
    own = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return _short(*own[-1]) if own else ""


def _short(path: str, line: str) -> str:
    return f"{path.rsplit('/', 1)[-1]}:{line}"
