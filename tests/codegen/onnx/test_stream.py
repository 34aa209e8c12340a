"""A file that was streamed holds what onnx would have written, and takes no second copy of the weights."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from gatecc.codegen.onnx.stream import save


def model(**weights: Any) -> ir.Model:
    """y = x, with initializers that nothing reads."""
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "main", [x], [y])
    made = ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 24)]))
    for name, weight in weights.items():
        tensor: Any = weight if isinstance(weight, ir.LazyTensor) else ir.tensor(weight)
        value = ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        made.graph.initializers.add(value)
    return made


W = np.arange(60_000, dtype=np.float32).reshape(300, 200)
KINDS: dict[str, Any] = {
    "plain": W,
    "transposed": W.T,
    "strided": W[::2, 1::3],
    "scalar": np.float32(3),
    "empty": W[:0],
    "small": np.arange(5),
    "half": W.astype(np.float16),
    "flags": W.T > 100,
}


@pytest.mark.parametrize("data", [None, "model.onnx.data"])
def test_every_tensor_is_there(tmp_path: Path, data: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatecc.codegen.onnx.stream._PIECE", 1000)  # some rows at a time
    lazy = ir.LazyTensor(lambda: ir.tensor(W.T.copy()), dtype=ir.DataType.FLOAT, shape=ir.Shape(W.T.shape), name="lazy")
    written = model(**KINDS, lazy=lazy)
    held = dict(written.graph.initializers)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        save({"model.onnx": written}, folder, data)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }
    assert {name: v.const_value for name, v in written.graph.initializers.items()} == {
        name: v.const_value for name, v in held.items()
    }
    onnx.checker.check_model(str(tmp_path / "one" / "model.onnx"), full_check=True)
    read = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "one" / "model.onnx").graph.initializer}
    for name, array in {**KINDS, "lazy": W.T}.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == np.asarray(array).dtype.newbyteorder("=")


def test_a_message_has_one_graph(tmp_path: Path) -> None:
    """Readers other than protobuf's own take the last of two."""
    save({"model.onnx": model(w=W)}, tmp_path)
    data, at, fields = (tmp_path / "model.onnx").read_bytes(), 0, list[int]()

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            at += 1
            value |= (data[at - 1] & 0x7F) << shift
            shift += 7
            if data[at - 1] < 0x80:
                return value

    while at < len(data):
        tag = number()
        fields.append(tag >> 3)
        size = number()
        at += size if tag & 7 == 2 else 0
    assert at == len(data)
    assert fields.count(7) == 1


def test_models_share_equal_weights(tmp_path: Path) -> None:
    save({"model.onnx": model(w=W, v=W + 1), "decode.onnx": model(other=W.copy())}, tmp_path, "model.onnx.data")
    assert 2 * W.nbytes <= (tmp_path / "model.onnx.data").stat().st_size < 2 * W.nbytes + 2 * 4096
    (decode,) = onnx.load(tmp_path / "decode.onnx").graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(decode), W)


@pytest.mark.parametrize("data", [None, "model.onnx.data"])
def test_no_copy_of_the_weights_is_made(tmp_path: Path, data: str | None) -> None:
    weights = {f"w{i}": np.ones((1024, 2048), np.float32).T for i in range(12)}
    size = sum(w.nbytes for w in weights.values())
    written = model(**weights)
    tracemalloc.start()
    save({"model.onnx": written}, tmp_path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.4 * size
