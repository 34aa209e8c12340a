"""Carried: one state of decode.onnx, as the manifest describes it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Carried:
    """One state: ``output`` of a call is ``input`` of the next. ``shape``: of the input; ``grows``: the axis that is 0
    before the first token and gets longer with each, None if its size stays; ``fill``: its value before the first.
    ``shared``: input and output may be one buffer with room for more tokens. A ``kind`` "dummy" is read by nothing:
    onnxruntime-genai wants it."""

    input: str
    output: str
    kind: str
    layer: int | None
    shape: list[int | str]
    dtype: str
    grows: int | None
    fill: float
    shared: bool
