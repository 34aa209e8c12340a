"""The table of torch.onnx: the same one as without gatecc, and each export has its own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("onnxscript")

from torch.onnx._internal.exporter._registration import ONNXRegistry

from gatecc.codegen.onnx.translations import known_translations


@pytest.mark.parametrize("opset", [18, 24])
def test_it_is_that_of_torch_and_nobody_elses(opset: int) -> None:
    before = ONNXRegistry.from_torchlib
    with known_translations():
        one, other = (ONNXRegistry().from_torchlib(opset_version=opset) for _ in range(2))
    assert ONNXRegistry.from_torchlib == before
    right = ONNXRegistry.from_torchlib(opset_version=opset)
    assert one.opset_version == other.opset_version == right.opset_version == opset
    names = {key: [row.onnx_function for row in rows] for key, rows in right.functions.items()}
    assert {key: [row.onnx_function for row in rows] for key, rows in one.functions.items()} == names
    target = next(iter(names))
    one.functions[target].append(one.functions[target][0])
    assert len(other.functions[target]) == len(names[target])
    one.register_op(torch.ops.aten.relu.default, lambda x: x)
    assert torch.ops.aten.relu.default not in other.functions
