"""The decode step in ONNX Runtime: one token behind a context, beside the graph of onnxruntime-genai's builder.

``python benchmarks/onnx_decode.py [--check]``; ``GATECC_ONLY=w8`` limits it to rows whose name holds the word. One
thread, CPU time, in turn, best of several; keys and values in one buffer (IO binding), as onnxruntime-genai runs it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from _table import Row, best_of, main
from onnx import TensorProto, helper
from onnx_export import expert, ids, llama, session

import gatecc

CONTEXTS = (512, 4096)
LONGEST = 8192  # positions
REPEATS = 40
HEADS, SHARED, WIDTH = 8, 4, 64


def decoding(path: Path, context: int) -> Callable[[], object]:
    """One token behind ``context`` others, whatever these were."""
    made = session(path)
    given = made.io_binding()
    buffers: dict[str, ort.OrtValue] = {}
    for i in made.get_inputs():
        if i.name == "input_ids":
            value = np.ones((1, 1), np.int64)
        elif i.name == "attention_mask":
            value = np.ones((1, context + 1), np.int64)
        else:
            free = {0: 1, 2: context + 64, 3: WIDTH}
            shape = [x if isinstance(x, int) else free[axis] for axis, x in enumerate(i.shape)]
            value = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        held = ort.OrtValue.ortvalue_from_numpy(value)
        given.bind_ortvalue_input(i.name, held)
        buffers[i.name.replace("past_key_values", "present").replace("past", "present")] = held
    for o in made.get_outputs():
        if o.name in buffers:
            given.bind_ortvalue_output(o.name, buffers[o.name])
        else:
            given.bind_output(o.name, "cpu")
    return partial(made.run_with_iobinding, given)


def ratio(one: Callable[[], object], other: Callable[[], object], repeats: int = REPEATS) -> float:
    """The CPU time of the first over that of the second."""
    for work in (one, other):
        work()
    first, second = best_of(one, other, repeats=repeats)
    return first / second


def operators(context: int) -> tuple[bytes, bytes]:
    """A step of linear attention, and one of softmax attention over a context, each alone in a graph."""
    info, kind = helper.make_tensor_value_info, TensorProto.FLOAT
    wide, state = [1, 1, HEADS * WIDTH], [1, HEADS, WIDTH, WIDTH]
    names = ("query", "key", "value", "past", "decay")
    shapes = (wide, wide, wide, state, wide)
    linear = helper.make_node(
        "LinearAttention", list(names), ["y", "present"], domain="com.microsoft", update_rule="gated",
        q_num_heads=HEADS, kv_num_heads=HEADS, scale=WIDTH**-0.5,
    )  # fmt: skip
    first = helper.make_graph(
        [linear], "linear", [info(n, kind, s) for n, s in zip(names, shapes, strict=True)],
        [info("y", kind, wide), info("present", kind, state)],
    )  # fmt: skip
    kept = [1, HEADS, "room", WIDTH]
    keys = ("past_key_values.key", "past_key_values.value")
    softmax = helper.make_node(
        "GroupQueryAttention", ["query", "key", "value", *keys, "last", "total"], ["y", "present.key", "present.value"],
        domain="com.microsoft", num_heads=HEADS, kv_num_heads=HEADS,
    )  # fmt: skip
    counts = [
        helper.make_tensor("last", TensorProto.INT32, [1], [context]),
        helper.make_tensor("total", TensorProto.INT32, [], [context + 1]),
    ]
    second = helper.make_graph(
        [softmax], "softmax",
        [*(info(n, kind, wide) for n in names[:3]), *(info(n, kind, kept) for n in keys)],
        [info("y", kind, wide), *(info(f"present.{n}", kind, kept) for n in ("key", "value"))], counts,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    one, other = (helper.make_model(g, ir_version=10, opset_imports=opsets) for g in (first, second))
    return one.SerializeToString(), other.SerializeToString()


def exported(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    gatecc.export(model, folder, {"input_ids": ids(2, 7)}, decode=True, **options)
    return folder / "decode.onnx"


def measure() -> Iterator[Row]:
    """The rows of the benchmark, each as soon as it is known."""
    only = os.getenv("GATECC_ONLY", "")
    with tempfile.TemporaryDirectory() as folder:
        for part in (against_the_expert, operator, narrow):
            for row in part(Path(folder), only):
                print(f"{row.what}: {row.figure:.3f}", flush=True)
                yield row


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return llama(max_position_embeddings=LONGEST).eval()


def against_the_expert(folder: Path, only: str) -> Iterator[Row]:
    """Softmax layers, and linear ones, beside the expert's softmax model."""
    if only not in "llama 6 x 512 decode, all linear but":
        return
    theirs = expert(model(), folder / "expert")
    if theirs is None:
        return
    ours = exported(model(), folder / "softmax")
    for context in CONTEXTS:
        found = ratio(decoding(ours, context), decoding(theirs, context))
        yield Row(f"llama 6 x 512, decode at {context} tokens: time over the expert's", found, 1.03)
    for kind, keep, bar in (("all linear", "", 0.4), ("linear but for every third layer", "2::3", None)):
        made = gatecc.transform(model(), gatecc.recipe("gla", keep=keep), {"input_ids": ids(2, 7)}, verify=False)
        linear = exported(made, folder / kind)
        for context in CONTEXTS:
            found, what = ratio(decoding(linear, context), decoding(theirs, context)), f"{kind}, decode at {context}"
            yield Row(
                f"llama 6 x 512, {what} tokens: time over the expert's softmax", found, bar if context > 512 else None
            )


def operator(folder: Path, only: str) -> Iterator[Row]:
    """One step of the operators alone."""
    if only not in "operator":
        return
    for context, bar in zip(CONTEXTS, (None, 1 / 15), strict=True):
        paths = [folder / f"{kind}_{context}.onnx" for kind in ("linear", "softmax")]
        for path, made in zip(paths, operators(context), strict=True):
            path.write_bytes(made)
        works = [decoding(path, context) for path in paths]
        yield Row(
            f"operator, step at {context} tokens: linear over softmax attention", ratio(works[0], works[1], 200), bar
        )


def narrow(folder: Path, only: str) -> Iterator[Row]:
    """Weights in fewer bits."""
    if only not in "w8 w4":
        return
    wide = exported(model(), folder / "wide")
    for form, bar in (("w8", 0.35), ("w4", None)):
        if only in form:
            made = exported(model(), folder / form, quantize=form)
            for context in (1, 512):
                found = ratio(decoding(made, context), decoding(wide, context))
                yield Row(
                    f"llama 6 x 512, {form}, decode at {context} tokens: time / float32",
                    found,
                    bar if context == 1 else None,
                )


if __name__ == "__main__":
    main("onnx_decode", lambda: list(measure()))
