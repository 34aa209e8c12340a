"""The Python path: the same edits on a running Python call, for calls that no graph can hold (a KV cache, hooks).

Only values that are visible from outside can be edited there: the operands and the result of an attention core, the
output of a submodule; sources may also be arguments of the scope. What cannot be done raises; it is never left out.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gatecc.capture.checkpointing import no_checkpointing
from gatecc.errors import CallNotCapturedError
from gatecc.ir.edit import Call, Editor
from gatecc.ir.program import Program, attribute, origin
from gatecc.ir.site import Attention

REMEDY = (
    "call without a cache object (use_cache=False), and without hooks on objects inside the scope; generate() of a "
    "transformers model keeps a state by itself, gatecc.decoder(model, inputs) does for loops of your own"
)


@dataclass(frozen=True)
class Anchor:
    """A value that Python can see. ``what`` is argument, core, operand or output; the rest says which."""

    what: str
    path: tuple[Any, ...] = ()  # argument: name and position in its structure; output: module path
    core: int = 0  # core and operand: the index of the attention core in the call
    operand: int = 0  # 0, 1, 2 for q, k, v


@dataclass(frozen=True)
class Op:
    """``slots`` are the tensors of ``function(*arguments)``, or of a call of the submodule ``path``. Arguments: Anchor,
    Slot or constant."""

    function: Callable[..., Any] | None
    path: str | None
    arguments: tuple[Any, ...]
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Slot:
    """The result of an earlier Op."""

    number: int


@dataclass(frozen=True)
class PythonEdit:
    """When the value at ``anchor`` appears, run ``ops`` and let ``result`` take its place."""

    anchor: Anchor
    ops: tuple[Op, ...]
    result: Anchor | Slot


@dataclass(frozen=True)
class PythonPath:
    """Every edit of a scope in the form that runs on Python calls; ``refused`` says why there is none."""

    edits: tuple[PythonEdit, ...] = ()
    cores: tuple[int, ...] = ()  # the query heads of each attention core, 0 if unknown
    refused: str = ""
    wants: frozenset[tuple[Any, ...]] = field(
        default_factory=frozenset[tuple[Any, ...]]
    )  # module outputs used as sources


def python_path(
    program: Program, editors: Sequence[Editor], cores: Sequence[Attention], names: Mapping[fx.Node, tuple[Any, ...]]
) -> PythonPath:
    """Say recorded edits in terms of anchors. ``names`` gives the argument path of each placeholder."""
    slots: dict[fx.Node, Slot] = {}
    moved: dict[fx.Node, Anchor] = {}  # where the values of earlier edits appear
    edits: list[PythonEdit] = []
    numbers = itertools.count()
    anchors = _Anchors(program, cores, names, {n for e in editors for n in e.inserted})
    for editor in editors:
        if editor.effects.loses_cache:
            return PythonPath(refused=f"{editor.rewrite} keeps no KV cache")
        if taken := next((effect for effect in editor.weights if not effect.keeps_forward), None):
            return PythonPath(refused=f"the module's own code cannot run any more: {taken.describe()}")
        ops: list[Op] = []
        for step in editor.steps:
            if isinstance(step, Call):
                arguments = tuple(_reference(a, slots, anchors) for a in step.arguments)
                made = [Slot(next(numbers)) for _ in step.results]
                slots |= dict(zip(step.results, made, strict=True))
                ops.append(Op(step.function, step.path, arguments, tuple(slot.number for slot in made)))
                continue
            anchor = None if step.some else moved.get(step.old) or anchors.of(step.old)
            result = _reference(step.new, slots, anchors)
            if anchor is None or result is None or None in [a for op in ops for a in op.arguments]:
                return PythonPath(refused=f"{editor.rewrite} edits {step.old.name}, which no Python call returns")
            moved[step.new] = anchor
            edits.append(PythonEdit(anchor, tuple(ops), result))
            ops = []
    wants = frozenset(
        a.path for e in edits for op in e.ops for a in op.arguments if isinstance(a, Anchor) and a.what == "output"
    )
    return PythonPath(tuple(edits), tuple(site.heads for site in cores), "", wants)


def _reference(argument: Any, slots: Mapping[fx.Node, Slot], anchors: _Anchors) -> Any:
    if not isinstance(argument, fx.Node):
        return argument
    return slots.get(argument) or anchors.of(argument)


@dataclass
class _Anchors:
    program: Program
    cores: Sequence[Attention]
    names: Mapping[fx.Node, tuple[Any, ...]]
    inserted: set[fx.Node]

    def of(self, node: fx.Node) -> Anchor | None:
        if node in self.names:
            return Anchor("argument", self.names[node])
        for i, site in enumerate(self.cores):
            if node is site.core:
                return Anchor("core", core=i)
        owner = origin(node).owner
        relative = self.program.relative_name(owner)
        if not relative or relative == owner == self.program.fqn:
            return self._operand(node)
        outside = all(not _within(origin(u).owner, owner) for u in node.users if u not in self.inserted)
        if outside and origin(node).call == 0:
            return Anchor("output", (relative,))
        return self._operand(node)

    def _operand(self, node: fx.Node) -> Anchor | None:
        """The query of a fused core, just before the call. Keys and values are cached before that: they have none."""
        for i, site in enumerate(self.cores):
            if site.spelling == "sdpa" and node is site.core.args[0]:
                return Anchor("operand", core=i, operand=0)
        return None


def _within(owner: str, outer: str) -> bool:
    return owner == outer or owner.startswith(outer + ".")


class _Run(TorchFunctionMode):
    """One call on the Python path: sees attention cores go by and edits them."""

    SOFTMAX = (F.softmax, torch.softmax, torch.Tensor.softmax)
    CASTS = (torch.Tensor.to, torch.Tensor.type, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.half)
    CUTS = (torch.Tensor.__getitem__, torch.narrow, torch.Tensor.narrow)  # the column of a sink is cut off
    VIEWS = (torch.Tensor.view, torch.reshape, torch.Tensor.reshape, torch.Tensor.contiguous, torch.Tensor.clone)
    THROUGH = (F.dropout, torch.dropout, torch.nan_to_num, torch.Tensor.nan_to_num, *CASTS, *CUTS, *VIEWS)
    PRODUCT = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)

    def __init__(self, path: PythonPath, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.path = path
        self.module = module
        self.arguments = arguments
        self.seen: dict[Anchor, torch.Tensor] = {}
        self.core = 0
        self.done: set[int] = set()
        self.slots: dict[int, torch.Tensor] = {}
        self.weights: list[torch.Tensor] = []  # kept alive: they are recognised by identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q = self._by_head(Anchor("operand", core=self.core), args[0] if args else kwargs.pop("query"))
            return self._core(func(q, *args[1:], **kwargs))
        if func in self.PRODUCT and any(args[0] is w for w in self.weights):
            return self._core(func(*args, **kwargs))
        out = func(*args, **kwargs)
        if func in self.SOFTMAX or (func in self.THROUGH and any(args[0] is w for w in self.weights)):
            self.weights.append(out)
        return out

    def _core(self, out: torch.Tensor) -> torch.Tensor:
        self.weights.clear()
        out = self._by_head(Anchor("core", core=self.core), out)
        self.core += 1
        return out

    def _by_head(self, anchor: Anchor, value: torch.Tensor) -> torch.Tensor:
        """Edit a (b, h, n, d) value, also where the call merges the heads of a group into tokens: (b, h/g, g*n, d).

        transformers does so when it decodes one token with grouped heads.
        """
        heads = self.path.cores[anchor.core] if anchor.core < len(self.path.cores) else 0
        if not heads or value.dim() != 4 or value.shape[1] == heads or heads % value.shape[1]:
            return self.edited(anchor, value)
        apart = value.reshape(value.shape[0], heads, -1, value.shape[-1])
        return self.edited(anchor, apart).reshape(value.shape)

    def edited(self, anchor: Anchor, value: torch.Tensor) -> torch.Tensor:
        """The value that takes the place of the one at an anchor."""
        self.seen[anchor] = value
        for number, edit in enumerate(self.path.edits):
            if edit.anchor == anchor:
                value = self._apply(edit, value)
                self.done.add(number)
        return value

    def _apply(self, edit: PythonEdit, value: torch.Tensor) -> torch.Tensor:
        for op in edit.ops:
            arguments = [self._value(a, edit.anchor, value) for a in op.arguments]
            call = attribute(self.module, op.path) if op.path else cast("Callable[..., Any]", op.function)
            self.slots |= dict(zip(op.slots, tree_leaves(call(*arguments)), strict=True))
        return self._value(edit.result, edit.anchor, value)

    def _value(self, reference: Any, anchor: Anchor, value: torch.Tensor) -> Any:
        if isinstance(reference, Slot):
            return self.slots[reference.number]
        if not isinstance(reference, Anchor):
            return reference
        if reference == anchor:
            return value
        if reference.what == "argument":
            return _dig(self.arguments, reference.path)
        return self.seen[reference]


def run_python(
    path: PythonPath,
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: str,
) -> Any:
    """Run ``forward(*args, **kwargs)`` with the edits. Raises CallNotCapturedError if one of them found no place."""
    if path.refused:
        raise _refusal(where, path.refused)
    bound = inspect.signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    run = _Run(path, module, bound.arguments)
    outputs = {e.anchor.path for e in path.edits if e.anchor.what == "output"} | path.wants
    with ExitStack() as stack:
        for (name,) in outputs:
            handle = module.get_submodule(name).register_forward_hook(_output_hook(run, name))
            stack.callback(handle.remove)
        with run, no_checkpointing(where or type(module).__name__):
            out = forward(*args, **kwargs)
    if run.core != len(path.cores) or len(run.done) != len(path.edits):
        raise _refusal(
            where,
            f"{run.core} attention cores ran, the graph has {len(path.cores)}; "
            f"{len(run.done)} of {len(path.edits)} edits found their value",
        )
    return out


def _output_hook(run: _Run, name: str) -> Callable[..., torch.Tensor | None]:
    def hook(module: nn.Module, args: Any, output: Any) -> torch.Tensor | None:
        return run.edited(Anchor("output", (name,)), output) if isinstance(output, torch.Tensor) else None

    return hook


def _dig(arguments: Mapping[str, Any], path: tuple[Any, ...]) -> Any:
    value: Any = arguments[path[0]] if path[0] in arguments else arguments["kwargs"][path[0]]
    for step in path[1:]:
        value = value[step]
    return value


def _refusal(where: str, reason: str) -> CallNotCapturedError:
    return CallNotCapturedError(
        "this call cannot become a graph, and the rewrite cannot be done in Python",
        where=where,
        found=reason,
        do=REMEDY,
    )
