"""What is computed from weights alone is a weight, once for all who compute it, and no number is there twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

onnx: Any = pytest.importorskip("onnx")

# A layer's gates are put in another order, twice; a large weight that is also read as it is stays as it is.
GRAPH = """
<ir_version: 10, opset_import: ["" : 24]>
main (float[batch, 2] x) => (float[1, 6, 2] one, float[1, 6, 2] two, float[batch, 64] y, float[64, 32] half)
<float[6, 2] gates, float[64, 64] large, int64[3] sizes = {1, 2, 3}, int64[1] front = {0}, float[64, 2] wide>
{
    a, b, c = Split <axis = 0> (gates, sizes)
    joined = Concat <axis = 0> (c, a, b)
    one_ = Unsqueeze (joined, front)
    one = Neg (one_)
    d, e, f = Split <axis = 0> (gates, sizes)
    again = Concat <axis = 0> (f, d, e)
    two_ = Unsqueeze (again, front)
    two = Abs (two_)
    turned = Transpose <perm = [1, 0]> (wide)
    z = MatMul (x, turned)
    y = MatMul (z, large)
    left, right = Split <axis = 1, num_outputs = 2> (large)
    half = Sub (left, right)
}
"""


def test_weights_that_are_put_in_another_order() -> None:
    from onnx.reference import ReferenceEvaluator
    from onnx_ir import serde

    from gatecc.codegen.onnx.tidy.unread import drop_unread
    from gatecc.codegen.onnx.tidy.weights import fold_weights

    random = np.random.default_rng(0)
    weights = {
        n: random.normal(size=s).astype("f") for n, s in (("gates", (6, 2)), ("large", (64, 64)), ("wide", (64, 2)))
    }
    proto = onnx.parser.parse_model(GRAPH)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in weights.items())
    before = ReferenceEvaluator(proto)
    model = serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
    fold_weights(model)
    drop_unread(model)
    assert sorted(node.op_type for node in model.graph) == ["Abs", "MatMul", "MatMul", "Neg", "Split", "Sub"]
    folded = serde.serialize_model(model)
    held = [onnx.numpy_helper.to_array(i) for i in folded.graph.initializer]
    assert sum(w.size for w in held if w.dtype == np.float32) == sum(w.size for w in weights.values())
    x, after = random.normal(size=(3, 2)).astype("f"), ReferenceEvaluator(folded)
    for one, other in zip(before.run(None, {"x": x}), after.run(None, {"x": x}), strict=True):
        np.testing.assert_array_equal(one, other)
