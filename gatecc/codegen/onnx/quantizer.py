"""Quantizer: the weights of an exported file in fewer bits, by ONNX Runtime's own quantizers.

They are narrower than the files that they are given: weight-only quantisation takes MatMul alone, names what it writes
after the weight (twice, if two nodes share it), and dynamic quantisation needs the types of contrib operators. This
file imports neither gatecc nor torch: the process that quantises a large model runs it by itself.
"""

from __future__ import annotations

import logging
import os
import runpy
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

_INTEGERS = ("MatMulNBits", "GatherBlockQuantized", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
_EXTERNAL = 3 * 2**29  # bytes of weights above which they get a file of their own
_PASSES = ("Add", "Cast", "Concat", "Div", "Gather", "GatherElements", "GatherND", "Identity", "LogSoftmax", "Mul")
_ON_THE_WAY = (*_PASSES, "Reshape", "Slice", "Softmax", "Split", "Squeeze", "Tanh", "Transpose", "Unsqueeze")
_SCORES = ("Exp", "ReduceMax", "ReduceSum", "Sigmoid", "Softplus", "Sqrt", "Sub", "Where")  # of what is chosen
_UNSAFE = ("Range", "CumSum", "TopK", "NonMaxSuppression")  # without kernels in float16, or too coarse there


def quantize(paths: Sequence[str], folder: str, form: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write files in another form ("w8", "w4", "int8", "fp16", "fp4") to a folder, under their names.

    Options: ``block``, ``accuracy_level``, ``embedding``, ``head``, ``keep`` (patterns of node or weight names),
    ``data`` (the file that holds their weights together, None for each its own). Returns of each file what became of
    its products: {"quantized": {operator: count}, "kept": {why: count}, "operators": {operator: count}, "bytes": ...}.
    """
    import onnx
    import onnx_ir as ir

    told: list[dict[str, Any]] = []
    made: dict[str, Any] = {}
    with _quiet():
        for path in paths:
            model, kept, changed = _quantized(onnx.load(path), form, options)
            told.append({**_described(model, kept), **({"quantized": changed} if form == "fp4" else {})})
            made[os.path.basename(path)] = ir.from_proto(model)
            made[os.path.basename(path)].graph.sort()  # casts come behind what reads them
            del model
    total = max(t["bytes"] for t in told)
    data = options["data"] if options["external"] or total > _EXTERNAL else None
    _beside("stream.py")["save"](made, Path(folder), data)
    return told


def _beside(name: str) -> dict[str, Any]:
    """What another file of this folder defines, which is not imported as a package."""
    return runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), name))


@contextmanager
def _quiet() -> Generator[None]:
    """The quantizers tell of each node, and one sets up the root logger of whoever imports it."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def _quantized(model: Any, form: str, options: Mapping[str, Any]) -> tuple[Any, Counter[str], dict[str, int]]:
    kept: Counter[str] = Counter()
    changed: dict[str, int] = {}
    if form == "fp16":
        model = _half(model)
    else:
        plain_products(model)
        left = _left_out(model, form, options, kept)
        if form == "fp4":
            changed = _beside("fp4.py")["fake"](model, left)
        else:
            model = _blocks(model, form, options, left) if form in ("w4", "w8") else _dynamic(model, options, left)
    _once_each(model)
    return model, kept, changed


def _described(model: Any, kept: Counter[str]) -> dict[str, Any]:
    counts = Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in _nodes(model.graph))
    quantized = {name: n for name, n in counts.items() if name.rpartition("::")[2] in _INTEGERS}
    return {
        "quantized": dict(sorted(quantized.items())),
        "kept": dict(sorted(kept.items())),
        "operators": dict(sorted(counts.items())),
        "bytes": sum(_nbytes(t) for t in model.graph.initializer),
        "buffers": _buffers(model.graph),
    }


def _buffers(graph: Any) -> list[str]:
    """The outputs that attention itself writes, with nothing between it and the input that it continues."""
    given = {value.name for value in graph.input}
    writers = [n for n in graph.node if n.op_type == "GroupQueryAttention" and given >= set(n.input[3:5])]
    written = {name for node in writers for name in node.output[1:]}
    return [value.name for value in graph.output if value.name in written]


# --- the quantizers ---------------------------------------------------------------------------------------------------


def _blocks(model: Any, form: str, options: Mapping[str, Any], left: Sequence[str]) -> Any:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer: Any = MatMulNBitsQuantizer(
        model,
        bits=int(form[1:]),
        block_size=options["block"],
        is_symmetric=True,
        accuracy_level=options["accuracy_level"],
        nodes_to_exclude=list(left),
        op_types_to_quantize=("MatMul", "Gather") if options["embedding"] else ("MatMul",),
    )
    quantizer.process()
    return quantizer.model.model


def _dynamic(model: Any, options: Mapping[str, Any], left: Sequence[str]) -> Any:
    """Weights in seven bits: products of eight by eight saturate on CPUs that add pairs in sixteen."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
    from onnxruntime.quantization.quant_utils import QuantizationMode

    version = model.ir_version
    quantizer: Any = ONNXQuantizer(
        model,
        True,  # per channel
        True,  # reduced range
        QuantizationMode.IntegerOps,
        False,  # scales are computed when it runs
        QuantType.QInt8,
        QuantType.QUInt8,
        None,
        None,
        list(left),
        ["MatMul", "Gather"] if options["embedding"] else ["MatMul"],
        {"DefaultTensorType": onnx.TensorProto.FLOAT, "MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    made = quantizer.model.model
    made.ir_version = version
    return made


def _half(model: Any) -> Any:
    """Inputs and outputs keep their types; what is infinite stays so."""
    import warnings

    from onnxruntime.transformers.float16 import convert_float_to_float16

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are clamped
        made = convert_float_to_float16(
            model, keep_io_types=True, disable_shape_infer=True, op_block_list=list(_UNSAFE)
        )
    _true_types(made)
    return made


def _true_types(model: Any) -> None:
    """Recorded types as they are: the converter calls float16 what comes out of the nodes that it leaves, and of
    casts."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(bare).graph.value_info
    types = {v.name: v.type.tensor_type.elem_type for v in inferred if v.type.HasField("tensor_type")}
    for value in model.graph.value_info:
        if types.get(value.name) and value.type.HasField("tensor_type"):
            value.type.tensor_type.elem_type = types[value.name]


# --- what they are given ----------------------------------------------------------------------------------------------


def plain_products(model: Any) -> None:
    """Products with a constant matrix as MatMul and Add: the quantizers know no other."""
    from onnx import helper

    graph = model.graph
    _take_out_products(graph)
    _turn_weights(graph)
    held = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        weight = held.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or not _is_plain(node, options):
            nodes.append(node)
            continue
        name = weight.name
        if options.get("transB", 0):
            name = _turned(graph, held, weight)
        biased = len(node.input) > 2 and bool(node.input[2])
        result = f"{node.output[0]}_product" if biased else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [result], name=node.name))
        if biased:
            added = helper.make_node("Add", [result, node.input[2]], [node.output[0]], name=f"{node.name}_bias")
            nodes.append(added)
    del graph.node[:]
    graph.node.extend(nodes)


def _take_out_products(graph: Any) -> None:
    """Attention that computes its queries, keys and values is a product, and attention to what it is split in."""
    from onnx import helper, numpy_helper

    held = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        if (node.domain, node.op_type) != ("com.microsoft", "Attention") or node.input[1] not in held:
            nodes.append(node)
            continue
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        whole, sizes = f"{node.output[0]}_product", options.pop("qkv_hidden_sizes", None)
        sizes = sizes or [held[node.input[1]].dims[1] // 3] * 3
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), f"{whole}_sizes"))
        parts = [f"{whole}_{part}" for part in "qkv"]
        nodes += [
            helper.make_node("MatMul", node.input[:2], [whole], name=f"{node.name}_product"),
            helper.make_node("Split", [whole, f"{whole}_sizes"], parts, name=f"{node.name}_parts", axis=-1),
            helper.make_node(
                "MultiHeadAttention", [*parts, *node.input[2:]], node.output, node.name, domain=node.domain, **options
            ),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def _turn_weights(graph: Any) -> None:
    """A matrix that is transposed when the graph runs (an embedding that is the head too) is held both ways."""
    from onnx import helper

    held = {t.name: t for t in graph.initializer}
    read = {name for node in graph.node if node.op_type == "MatMul" for name in node.input[1:]}
    nodes: list[Any] = []
    renamed: dict[str, str] = {}
    for node in graph.node:
        order = [helper.get_attribute_value(a) for a in node.attribute if a.name == "perm"] or [[1, 0]]
        weight = held.get(node.input[0]) if node.op_type == "Transpose" and node.output[0] in read else None
        if weight is None or len(weight.dims) != 2 or list(order[0]) != [1, 0]:
            nodes.append(node)
        else:
            renamed[node.output[0]] = _turned(graph, held, weight)
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = renamed.get(name, name)
    del graph.node[:]
    graph.node.extend(nodes)


def _turned(graph: Any, held: dict[str, Any], weight: Any) -> str:
    """The name of the transposed weight, which is made once."""
    from onnx import numpy_helper

    name = f"{weight.name}_transposed"
    if name not in held:
        turned = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(weight).T), name)
        graph.initializer.append(turned)
        held[name] = turned
    return name


def _is_plain(node: Any, options: Mapping[str, Any]) -> bool:
    """Whether a node is a product that a MatMul computes as well, once its weight is turned."""
    if node.op_type not in ("Gemm", "FusedMatMul"):
        return False
    others = ("transA", "transBatchA", "transBatchB")
    return all(not options.get(o, 0) for o in others) and options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0


def _left_out(model: Any, form: str, options: Mapping[str, Any], kept: Counter[str]) -> list[str]:
    """The nodes that stay as they are. Each has a name afterwards."""
    held = {t.name: t for t in model.graph.initializer}
    wanted = {} if options["head"] else dict.fromkeys(_last_products(model, _ends(model)), "head=False")
    if form == "fp4":
        chosen = [n.input[0] for n in model.graph.node if n.op_type in ("TopK", "ArgMax")]
        wanted.update(dict.fromkeys(_last_products(model, chosen, _SCORES), "something is chosen by it"))
    left: list[str] = []
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"node_{i}"
        if node.op_type == "Gather" and node.input[0] in held and _is_matrix(held[node.input[0]]):
            reason = _gather(held[node.input[0]], options)
        elif node.op_type != "MatMul" or not any(x in held for x in node.input):
            continue
        elif len(node.input) > 1 and node.input[1] not in held:
            reason = "the constant matrix is on the left"
        elif node.name in wanted:
            reason = wanted[node.name]
        else:
            reason = _matrix(held[node.input[1]])
        weight = next((x for x in node.input if x in held), "")
        if not reason and any(fnmatchcase(name, p) for p in options["keep"] for name in (node.name, weight)):
            reason = "keep"
        if reason:
            kept[f"{node.op_type}: {reason}"] += 1
            left.append(node.name)
    return left


def _gather(weight: Any, options: Mapping[str, Any]) -> str:
    if not options["embedding"]:
        return "embedding=False"
    return "" if weight.dims[1] % options["block"] == 0 else "its rows are no multiple of the block"


def _matrix(weight: Any) -> str:
    if not _is_matrix(weight):
        return "the weight is no matrix"
    return ""


def _is_matrix(weight: Any) -> bool:
    import onnx

    return len(weight.dims) == 2 and weight.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def _ends(model: Any) -> list[str]:
    return [o.name for o in model.graph.output]


def _last_products(model: Any, ends: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """The products behind which there is nothing but sums, factors and layouts (and ``more``) until one of these."""
    made = {name: node for node in model.graph.node for name in node.output}
    found: list[str] = []
    waiting = list(ends)
    seen: set[int] = set()
    while waiting:
        node = made.get(waiting.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op_type == "MatMul":
            found.append(node.name)
        elif node.op_type in (*_ON_THE_WAY, *more):
            waiting += [x for x in node.input if x]
    return found


# --- what comes back --------------------------------------------------------------------------------------------------


def _once_each(model: Any) -> None:
    """Initializers by name, once; names are told only in graphs that they belong to."""
    seen: dict[str, Any] = {}
    for tensor in model.graph.initializer:
        seen.setdefault(tensor.name, tensor)
    if len(seen) == len(model.graph.initializer):
        return
    rest = list(seen.values())
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)


def _nodes(graph: Any) -> list[Any]:
    inside = [a.g for n in graph.node for a in n.attribute if a.HasField("g")]
    return [*graph.node, *(n for g in inside for n in _nodes(g))]


def _nbytes(tensor: Any) -> int:
    return len(tensor.raw_data) or tensor.ByteSize()
