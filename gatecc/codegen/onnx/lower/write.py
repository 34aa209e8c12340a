"""Writer: nodes of ONNX in an FX graph, as torch.onnx takes them over."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.node import map_aggregate
from torch.onnx.ops import _symbolic_impl

from gatecc.ir.loops import free_lengths
from gatecc.ir.program import META, Origin, Program, origin
from gatecc.ir.sizes import same

aten: Any = torch.ops.aten
_ONE: Any = torch.ops.onnx_symbolic._symbolic.default
_SEVERAL: Any = torch.ops.onnx_symbolic._symbolic_multi_out.default
_TYPES: Any = vars(_symbolic_impl)["_dtype_mappings"]
_CODES = {dtype: code for code, dtype in _TYPES.ONNX_DTYPE_TO_TORCH_DTYPE.items()}
Attributes = Mapping[str, Any]
Shape = Sequence[int | torch.SymInt]


class UnwritableError(Exception):
    """A size that no input of a node has: the node cannot be put there."""


class Writer:
    """Puts nodes in front of ``place``, in its name. ``lowering`` is who puts them there."""

    def __init__(self, program: Program, place: fx.Node, lowering: str) -> None:
        self.program, self.place, self.lowering = program, place, lowering

    def onnx(self, op: str, inputs: Sequence[fx.Node | None], attributes: Attributes, like: fx.Node) -> fx.Node:
        """A node ``Op`` or ``domain::Op`` whose result has the shape and dtype of ``like``."""
        value = like.meta["val"]
        return self.shaped(op, inputs, attributes, tuple(value.shape), value.dtype)

    def shaped(
        self, op: str, inputs: Sequence[fx.Node | None], attributes: Attributes, shape: Shape, dtype: torch.dtype
    ) -> fx.Node:
        """A node with one result of this shape."""
        sizes = self.sizes(shape, inputs)
        made = self._symbolic(_ONE, op, inputs, attributes, _CODES[dtype], {"shape": sizes})
        made.meta["val"] = self._empty(inputs, shape, dtype)
        return made

    def several(
        self, op: str, inputs: Sequence[fx.Node | None], attributes: Attributes, shapes: Sequence[Shape],
        dtype: torch.dtype,
    ) -> list[fx.Node]:  # fmt: skip
        """A node with several results."""
        sizes = [self.sizes(shape, inputs) for shape in shapes]
        made = self._symbolic(_SEVERAL, op, inputs, attributes, [_CODES[dtype]] * len(shapes), {"shapes": sizes})
        made.meta["val"] = [self._empty(inputs, shape, dtype) for shape in shapes]
        results: list[fx.Node] = []
        for i, value in enumerate(made.meta["val"]):
            results.append(self._add(operator.getitem, (made, i), {}))
            results[-1].meta["val"] = value
        return results

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an ATen operator; sizes among its arguments may be symbolic."""
        given = [n for a in args for n in (a if isinstance(a, list | tuple) else [a]) if isinstance(n, fx.Node)]

        def sized(value: Any) -> Any:
            return self.size(value, given) if isinstance(value, torch.SymInt) else value

        written = map_aggregate(args, sized)
        made = self._add(target, written, kwargs)
        values: Any = fx.map_arg((written, kwargs), lambda n: n.meta["val"])
        with self._mode(given) or nullcontext(), free_lengths():
            made.meta["val"] = target(*values[0], **values[1])
        return made

    def called(self, source: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A call in the name of another node than the place."""
        made = self.call(target, *args)
        made.meta.update({k: source.meta[k] for k in ("nn_module_stack", "stack_trace") if k in source.meta})
        made.meta[META] = self._origin(source)
        return made

    def constant(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A tensor that the graph holds; one of the same name and values is used again."""
        at = f"_onnx_{name}"
        number = 0
        while (known := self.program.constants.get(at)) is not None and not _equal(known, tensor):
            number += 1
            at = f"_onnx_{name}_{number}"
        if known is None:
            self.program.constants[at] = tensor
            self.program.graph_module.register_buffer(at, tensor, persistent=False)
        with self.program.graph.inserting_before(self.place):
            node = self.program.graph.get_attr(at)
        mode = self._mode(())
        node.meta["val"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
        return node

    def sizes(self, shape: Shape, inputs: Sequence[fx.Node | None]) -> list[Any]:
        """A shape as arguments of a node: numbers, and nodes for those that are not."""
        return [self.size(size, inputs) for size in shape]

    def size(self, size: int | torch.SymInt, inputs: Sequence[fx.Node | None] = ()) -> Any:
        """One size as an argument of a node."""
        if isinstance(size, int):
            return size
        for node in (*inputs, *self.program.placeholders):
            held = None if node is None else node.meta.get("val")
            for axis, other in enumerate(held.shape if isinstance(held, torch.Tensor) else ()):
                if same(size, other) and node is not None:
                    made = self._add(aten.sym_size.int, (node, axis), {})
                    made.meta["val"] = other
                    return made
        raise UnwritableError(f"the size {size} is that of no input")

    def _symbolic(
        self, target: Any, op: str, inputs: Sequence[fx.Node | None], attributes: Attributes, dtype: Any,
        shapes: dict[str, Any],
    ) -> fx.Node:  # fmt: skip
        domain, _, name = op.rpartition("::")
        coded = _symbolic_impl.EncodedAttrs.from_dict(dict(attributes))
        kwargs = {
            **shapes,
            "attr_keys": coded.attr_keys,
            "attr_types": coded.attr_types,
            "attr_pos": [list(at) for at in coded.attr_pos],
            "attr_ints": coded.attr_ints,
            "attr_floats": coded.attr_floats,
            "attr_strs": coded.attr_strs,
            "metadata_props_keys": [],
            "metadata_props_values": [],
            "domain": domain,
            "version": 1 if domain else None,
        }
        return self._add(target, (list(inputs), name, dtype), kwargs)

    def _add(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        with self.program.graph.inserting_before(self.place):
            made = self.program.graph.call_function(target, args, kwargs)
        made.meta = {k: self.place.meta[k] for k in ("nn_module_stack", "stack_trace") if k in self.place.meta}
        made.meta[META] = self._origin(self.place)
        return made

    def _origin(self, node: fx.Node) -> Origin:
        """That of a node in whose name another is put: what a rewrite made stays its own."""
        at = origin(node)
        return at if at.inserted_by else replace(at, inserted_by=self.lowering)

    def _empty(self, inputs: Sequence[fx.Node | None], shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        device = next((n.meta["val"].device for n in inputs if n is not None), torch.device("cpu"))
        with self._mode(inputs) or nullcontext():
            return torch.empty(shape, dtype=dtype, device=device)

    def _mode(self, inputs: Sequence[fx.Node | None]) -> Any:
        nodes = [n for n in inputs if n is not None] or self.program.placeholders
        return detect_fake_mode([n.meta["val"] for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)])


def is_onnx(node: fx.Node, *ops: str) -> bool:
    """Whether a node is one of these nodes of ONNX, of any without names."""
    return node.target in (_ONE, _SEVERAL) and (not ops or node.args[1] in ops)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
