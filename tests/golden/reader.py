"""Reader: a Program from the text that gatecc.ir.printer writes. Letters in sizes are dynamic (b=2, n=3, m=5, ...)."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from gatecc.ir.program import META, Origin, Program

HINTS = {"b": 2, "n": 3, "m": 5, "y": 7, "x": 11, "t": 13}
_REFERENCE = re.compile(r"%(\w+)|@([\w.]+)")


class Reader:
    """Reads one graph. ``sizes`` maps the symbols that torch made to the letters of the text."""

    def __init__(self, text: str) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.module = nn.Module().eval()  # what is not drawn and not counted reads best
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.sizes: dict[str, str] = {}
        self.example: list[Tensor] = []
        self._seed = torch.Generator().manual_seed(0)
        for line in filter(None, map(str.strip, text.splitlines())):
            code, _, comment = line.partition("#")
            self._line(code.strip(), comment.strip())
        spec = pytree.tree_flatten(self.graph.output_node().args[0])[1]
        paths: list[tuple[Any, ...]] = [(n.name,) for n in self.graph.nodes if n.op == "placeholder"]
        self.program = Program(self.module, fx.GraphModule(self.module, self.graph), "", self.example, spec, paths)
        self.graph = self.program.graph
        self.graph.owning_module = None

    def _line(self, code: str, comment: str) -> None:
        size, _, owner = (part.strip() for part in comment.partition("|"))
        if owner:
            self._holder(owner)
        if code.startswith("return"):
            self.graph.output(tuple(self._evaluate(f"[{code.removeprefix('return')}]", owner)))
        elif code.startswith("@"):
            self._parameter(code[1:], size)
        elif code.endswith("= input"):
            self._input(code[1:].split()[0], size)
        else:
            name, expression = code[1:].split(" = ", 1)
            node = self._evaluate(expression, owner)
            node._rename(name)
            self.nodes[name] = node

    def _parameter(self, path: str, size: str) -> None:
        holder, _, name = path.rpartition(".")
        shape = [int(s) for s in size.split()]
        value = nn.Parameter(torch.randn(shape, generator=self._seed))
        self._holder(holder).register_parameter(name, value)
        node = self.graph.get_attr(path)
        node.meta = {"val": self.mode.from_tensor(value, static_shapes=True), META: Origin(holder)}
        self.nodes["@" + path] = node

    def _input(self, name: str, size: str) -> None:
        letters, dtype = _split(size)
        shape = [int(s) if s.isdigit() else HINTS[s] for s in letters]
        value = torch.randn(shape, generator=self._seed) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        dynamic = [DimDynamic.STATIC if s.isdigit() else DimDynamic.DUCK for s in letters]
        fake = self.mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
        self.sizes.update({str(s): letter for s, letter in zip(fake.shape, letters, strict=True) if letter in HINTS})
        self.example.append(value)
        node = self.graph.placeholder(name)
        node.meta = {"val": fake, META: Origin("")}
        self.nodes[name] = node

    def _holder(self, path: str) -> nn.Module:
        module = self.module
        for part in filter(None, path.split(".")):
            if part not in module._modules:
                module.add_module(part, nn.Module().eval())
            module = module.get_submodule(part)
        return module

    def _evaluate(self, expression: str, owner: str) -> Any:
        code = _REFERENCE.sub(lambda m: f"V[{(m[1] or '@' + m[2])!r}]", expression)
        return eval(code, {"__builtins__": {}}, _Names(self, owner))

    def call(self, name: str, owner: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Add one operator call."""
        target = _operator(name)
        node = self.graph.call_function(target, args, kwargs)
        values = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.mode:
            node.meta = {"val": target(*values[0], **values[1]), META: Origin(owner)}
        return node


class _Names(dict[str, Any]):
    """The names of an expression: V for values, None and so on, and every other name an operator."""

    def __init__(self, reader: Reader, owner: str) -> None:
        super().__init__(V=reader.nodes, **{"None": None, "True": True, "False": False, "inf": float("inf")})
        self.reader, self.owner = reader, owner

    def __missing__(self, name: str) -> Any:
        dtype = getattr(torch, name, None)
        return dtype if isinstance(dtype, torch.dtype) else _Operator(self.reader, self.owner, name)


class _Operator:
    def __init__(self, reader: Reader, owner: str, name: str) -> None:
        self.reader, self.owner, self.name = reader, owner, name

    def __getattr__(self, part: str) -> _Operator:
        return _Operator(self.reader, self.owner, f"{self.name}.{part}")

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Node:
        return self.reader.call(self.name, self.owner, args, kwargs)


def _operator(name: str) -> Any:
    if name == "getitem":
        return operator.getitem
    first, *rest = name.split(".")
    space = torch.ops.gatecc if first == "gatecc" else torch.ops.aten
    parts = rest if first == "gatecc" else [first, *rest]
    return getattr(getattr(space, parts[0]), parts[1] if len(parts) > 1 else "default")


def _split(size: str) -> tuple[list[str], torch.dtype]:
    parts = size.split()
    dtype = getattr(torch, parts[-1], None) if parts else None
    return (parts[:-1], dtype) if isinstance(dtype, torch.dtype) else (parts, torch.float32)
