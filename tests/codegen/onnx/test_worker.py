"""The other process answers as this one does, with its errors too, and ends. A race counts runs alone."""

from __future__ import annotations

import itertools
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from gatecc.codegen.onnx.worker import Apart, RaisedThereError, Worker

pytest.importorskip("onnxruntime")


def written(path: Path, operator: str = "Neg") -> str:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], name="the_node")], "main", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 24)]), path)
    return str(path)


def test_apart_is_as_here(tmp_path: Path) -> None:
    path, feeds = written(tmp_path / "right.onnx"), {"x": np.arange(3, dtype=np.float32)}
    wrong = written(tmp_path / "wrong.onnx", "Nothing")
    with closing(Apart()) as apart, closing(Worker()) as here:
        for worker in (apart, here):
            worker.check(path)
            assert worker.load(path, {}) == (["x"], ["y"])
            np.testing.assert_array_equal(worker.run(feeds)[0], [-0.0, -1.0, -2.0])
        with pytest.raises(RaisedThereError) as there:
            apart.load(wrong, {})
        with pytest.raises(Exception, match="Nothing") as told:
            here.load(wrong, {})
        assert (there.value.kind, str(there.value)) == (type(told.value).__name__, str(told.value))
        process = apart._process
    assert process.returncode is not None
    with pytest.raises(RaisedThereError, match="ended with code"):
        apart.run(feeds)


def test_a_clock_that_stands_still_is_no_time_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each third reading of the clock is that of the reading before."""
    readings = itertools.count()
    monkeypatch.setattr(time, "thread_time", lambda: 2.0 * ((n := next(readings)) - n % 3 // 2))
    path, feeds = written(tmp_path / "right.onnx"), {"x": np.arange(3, dtype=np.float32)}
    with closing(Worker()) as here:
        assert here.race([path, path], feeds, 0.0) == [2.0, 2.0]
