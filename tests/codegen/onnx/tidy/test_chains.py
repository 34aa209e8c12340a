"""Reshapes and transposes that follow each other become one or none, and the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx: Any = pytest.importorskip("onnx")
ort: Any = pytest.importorskip("onnxruntime")

GRAPH = """
<ir_version: 10, opset_import: ["" : 24]>
main (float[batch, sequence, 32] x) => (
    float[batch, sequence, 32] back, float[sequence, batch, 8, 4] turned,
    float[batch, sequence, 16, 2] apart, float[batch, sequence, 32] same
)
<int64[4] heads = {0, 0, 4, 8}, int64[3] rows = {0, 0, 32}, int64[4] pairs = {0, 0, 16, 2}>
{
    doubled = Add (x, x)
    a = Reshape (doubled, heads)
    b = Transpose <perm = [0, 2, 1, 3]> (a)
    c = Transpose <perm = [0, 2, 1, 3]> (b)
    back = Reshape (c, rows)
    d = Transpose <perm = [1, 2, 3, 0]> (a)
    turned = Transpose <perm = [0, 3, 2, 1]> (d)
    apart = Reshape (c, pairs)
    same = Identity (x)
}
"""


def test_chains_of_layouts() -> None:
    from onnx_ir import serde

    from gatecc.codegen.onnx.tidy.chains import shorten_chains
    from gatecc.codegen.onnx.tidy.unread import drop_unread

    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(GRAPH))
    model = serde.deserialize_model(proto)
    shorten_chains(model)
    drop_unread(model)
    kinds = sorted(node.op_type for node in model.graph)
    assert kinds == ["Add", "Identity", "Reshape", "Reshape", "Transpose"]  # the input is no output without a node
    after = serde.serialize_model(model)
    for batch, sequence in ((1, 1), (3, 5)):
        x = np.arange(batch * sequence * 32, dtype=np.float32).reshape(batch, sequence, 32)
        runs = [ort.InferenceSession(m.SerializeToString()).run(None, {"x": x}) for m in (proto, after)]
        for one, other in zip(*runs, strict=True):
            np.testing.assert_array_equal(one, other)
