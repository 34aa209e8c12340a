"""The lines of ONNX, run in ONNX Runtime, against the recurrence in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from gatecc.codegen.onnx.spelled import forget_shapes
from gatecc.ops.linear_attention.onnx_lines import by_chunk, by_chunk_or_step, by_token
from gatecc.ops.linear_attention.reference import token_by_token
from tests.ops.linear_attention.cases import double, operands, relative

ort = pytest.importorskip("onnxruntime")
B, H, DK, E = 3, 2, 16, 12
KINDS = ["mild", "-3", "-12", "mixed", "zero", "one"]


def session(lines: list[str], given: dict[str, Tensor]) -> Any:
    """A graph of opset 18 that holds the lines, with all sizes free."""
    read, results = ", ".join(f"float[?,?,?,?] {name}" for name in given), "float[?,?,?,?] o, float[?,?,?,?] final"
    head = '<ir_version: 10, opset_import: ["" : 18]>'
    model = onnx.parser.parse_model(f"{head} form ({read}) => ({results}) {{ {' '.join(lines)} }}")
    forget_shapes(model.graph)
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("rule", "width"),
    [("linear", 0), ("gated", 1), ("gated", DK), ("delta", 0), ("gated_delta", 1), ("gated_delta", DK)],
)
@pytest.mark.parametrize("chunks", [by_chunk, by_chunk_or_step])
def test_every_rule_at_every_length_and_decay(rule: str, width: int, chunks: Callable[..., list[str]]) -> None:
    lines = by_token("gated" in rule) if "delta" in rule else chunks(DK, E, width)
    run = None
    for N in (1, 7, 32, 33, 100):
        for kind in KINDS if "gated" in rule else KINDS[:1]:
            given = {**operands(rule, B, H, N, DK, E, kind), "state": torch.randn(B, H, DK, E)}
            if width == 1:
                given["log_decay"] = given["log_decay"][..., :1]
            if "beta" in given:
                given["beta"] = given["beta"].unsqueeze(-1)
            wide = double(given)
            q, k, v = (wide[n] for n in ("q", "k", "v"))
            truth = token_by_token(q, k, v, wide.get("log_decay"), wide.get("beta"), wide["state"])
            feeds = {n.replace("log_", ""): x for n, x in given.items()}
            run = run or session(lines, feeds)
            found = run.run(None, {n: x.numpy() for n, x in feeds.items()})
            for y, expected in zip(found, truth, strict=True):
                assert relative(torch.from_numpy(y), expected) < (4e-6 if kind in ("mild", "one") else 2e-4), (N, kind)
