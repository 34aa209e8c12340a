"""Editor: the hands of a rewrite. It inserts traced calls, replaces values, and makes the modules that hold new
parameters.

Everything that an editor does is recorded as well (`Step`), because the same edit must be possible on a running Python
call where no graph can be had (see gatecc.scope.python_path), and on every layer that shares the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import fx, nn
from torch._guards import detect_fake_mode
from torch.utils._pytree import TreeSpec, tree_flatten

from gatecc.errors import GraphError, SiteRefusedError
from gatecc.ir.boundary import Boundary, Slot, follow, held, within
from gatecc.ir.effects import Effects
from gatecc.ir.functions import copies_of, entries
from gatecc.ir.ops import mutates, writes_for_others
from gatecc.ir.printer import window
from gatecc.ir.program import META, Origin, Program, attribute, origin
from gatecc.ir.select import Selector
from gatecc.ir.site import Masking, Site
from gatecc.ir.trace import tensor_names, trace
from gatecc.ir.weights import (
    Build,
    Drop,
    Effect,
    Fill,
    NewModule,
    ScaleWeight,
    Split,
    WidenColumns,
    WidenWeight,
    is_wrapped,
)
from gatecc.ir.widen import Rows

CONTAINERS = (
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
)  # their forward iterates over children: a new child would run


@dataclass(frozen=True, eq=False)
class Call:
    """``results`` are the tensors of ``function(*arguments)``, in order; ``path`` names the module (relative to the
    program's) if function is one."""

    function: Callable[..., Any] | None
    path: str | None
    arguments: tuple[Any, ...]
    results: tuple[fx.Node, ...]


@dataclass(frozen=True, eq=False)
class Replace:
    """Every later reader of ``old`` reads ``new``; with ``some``, only the readers that the edit chose."""

    old: fx.Node
    new: fx.Node
    some: bool = False


Step = Call | Replace


@dataclass(eq=False)
class Editor:
    """Edits one program at one site in the name of one rewrite. ``sites`` are all sites of the program."""

    program: Program
    site: Site
    rewrite: str
    own: set[str] = field(default_factory=set[str])  # paths of the modules that gatecc made in this scope, ever
    taken: set[str] = field(default_factory=set[str])  # those that the edits of this very build use
    steps: list[Step] = field(default_factory=list[Step])
    weights: list[Effect] = field(default_factory=list[Effect])
    inserted: set[fx.Node] = field(default_factory=set[fx.Node])
    erased: set[fx.Node] = field(default_factory=set[fx.Node])
    called: set[Boundary] = field(default_factory=set[Boundary])  # of new modules that have hooks
    sites: Sequence[Site] = ()
    lost: set[str] = field(default_factory=set[str])  # parameters that the edit takes out of the graph on purpose
    hidden: set[int] = field(default_factory=set[int])  # numbers of the outputs that are None from now on
    effects: Effects = field(default_factory=Effects)  # those of the rewrite
    selected: Selector | None = None  # the sites of the rewrite, of which this is one

    def module(self, name: str, build: Build, fill: Fill | None = None) -> str:
        """The path of a new submodule called ``name`` on the site's owner; made by ``build`` unless it exists already.

        What it takes from weights of the model is written by ``fill(new, layer)``: ``layer`` is the module of the
        program, and each layer that shares the graph gets a module filled from its own weights. The module is
        registered on the owner, or on the nearest module whose forward does not iterate over its children. A name that
        the model or an earlier edit has taken gets a number.
        """
        path = self._free(name)
        self._prepare(NewModule(path, build, fill), path)
        return path

    def _free(self, name: str) -> str:
        """A path for something new that this edit calls ``name``: the same one each time that the edit is done."""
        holder_path = self._holder()
        holder = self.program.module.get_submodule(holder_path)
        number = itertools.count(1)
        candidate = name
        path = f"{holder_path}.{candidate}".lstrip(".")
        while path in self.taken or (hasattr(holder, candidate) and path not in self.own):
            candidate = f"{name}_{next(number)}"
            path = f"{holder_path}.{candidate}".lstrip(".")
        self.taken.add(path)
        return path

    def _prepare(self, effect: Effect, path: str) -> None:
        """Note an effect that makes a module at a path, and make it, for the graph to read."""
        self.weights.append(effect)
        if path not in self.own:
            effect.prepare(self.program.module)
            self.own.add(path)

    def _holder(self) -> str:
        """The module that new submodules of this site are registered on, relative to the program's."""
        owner = self.program.relative_name(self.site.owner)
        while isinstance(self.program.module.get_submodule(owner), CONTAINERS) and owner:
            owner = owner.rpartition(".")[0]
        if not isinstance(self.program.module.get_submodule(owner), CONTAINERS):
            return owner
        inner = self.program.relative_name(origin(self.site_node).owner)
        if inner and not isinstance(self.program.module.get_submodule(inner), CONTAINERS):
            return inner
        raise GraphError(
            f"the rewrite {self.rewrite} has no module to put its parameters on",
            where=f"{self.site.owner} {self.site.line}".strip(),
            found=f"the site belongs to a {type(self.program.module).__name__}, which would run them as layers",
            do="put the container inside a module with a forward of its own",
        )

    def scale_weight(self, fqn: str, factor: float) -> None:
        """Ask the engine to multiply a parameter by a power of two, once per layer, when the edit is installed."""
        self.weights.append(ScaleWeight(self.program.relative_name(fqn), factor))

    def drop(self, fqn: str) -> None:
        """Ask the engine to take a submodule, parameter or buffer that the edited graph no longer reads out of each
        layer.

        It leaves the parameters and the state dict, and `revert` puts it back. Hooks on a module that goes are not
        called any more. A graph that still reads it at the end is an error.
        """
        path = self.program.relative_name(fqn)
        self.weights.append(Drop(path))
        self.program.boundaries[:] = [b for b in self.program.boundaries if not within(b.path, path)]

    def split(self, fqn: str, sizes: Sequence[int], axis: int = 0, name: str = "parts") -> list[fx.Node]:
        """The nodes of the parameters into which a weight is cut along an axis, in parts of ``sizes``.

        They are parameters of a new ParameterList called ``name`` on the site's owner; the weight itself leaves the
        layer, so nothing else may read it. Training goes on with the parts, and `revert` joins them.
        """
        into = self._free(name)
        self._prepare(Split(self.program.relative_name(fqn), into, axis, tuple(sizes)), into)
        return [self.parameter(f"{into}.{number}") for number in range(len(sizes))]

    def parameter(self, path: str) -> fx.Node:
        """A node that reads a parameter or buffer of the program's module, such as of a new module."""
        mode = detect_fake_mode([n.meta["val"] for n in self.program.placeholders])
        assert mode is not None
        held = mode.from_tensor(cast("torch.Tensor", attribute(self.program.module, path)), static_shapes=True)
        with self.program.graph.inserting_after(self._first_call()):
            node = self.program.graph.get_attr(path)
        node.meta["val"] = held
        self._mark(node, node, "")
        return node

    def duplicate(self, nodes: Sequence[fx.Node], instead: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Copies of nodes, given in order, behind the last of them; they read ``instead`` of what is named there, and
        come behind that, too."""
        copied, anchor = dict(instead), max([nodes[-1], *instead.values()])
        for node in nodes:
            with self.program.graph.inserting_after(anchor):
                copied[node] = anchor = self.program.graph.node_copy(node, lambda n: copied.get(n, n))
            self._mark(anchor, node, "")
        inside = [call for call in self.program.functions if call.inside & set(nodes)]
        self.program.functions += copies_of(inside, {**{n: n for n in self.program.graph.nodes}, **copied})
        return copied

    @property
    def gone(self) -> list[str]:
        """The modules and tensors that the layer has no more once the edit is installed."""
        return [path for effect in self.weights for path in effect.gone]

    @overload
    def call(self, function: Callable[..., torch.Tensor], *arguments: Any, name: str = "") -> fx.Node: ...
    @overload
    def call(
        self, function: Callable[..., tuple[torch.Tensor, ...]], *arguments: Any, name: str = ""
    ) -> tuple[fx.Node, ...]: ...
    @overload
    def call(self, function: str, *arguments: Any, name: str = "") -> Any: ...
    def call(self, function: Callable[..., Any] | str, *arguments: Any, name: str = "") -> Any:
        """Insert ``function(*arguments)``, traced to ATen operators, as early as its arguments allow.

        ``function`` is a Python function of tensors, or the path of a module (from `module`). Arguments that are nodes
        are tensors of the graph; others are constants. Returns the node of the result, or a tuple of nodes for a tuple
        of tensors: a router yields weights, indices and a loss.
        """
        nodes = [a for a in arguments if isinstance(a, fx.Node)]
        path = function if isinstance(function, str) else None
        module = cast("nn.Module", attribute(self.program.module, path)) if path else None
        traced, spec = trace(module or cast("Callable[..., Any]", function), arguments)
        anchor = max(nodes) if nodes else self._first_call()
        before = set(self.inserted)
        results = self._inline(traced, path or "", nodes, anchor, name)
        if path and path in self.program.hooked:
            self._call_hooks(path, nodes, results, spec, self.inserted - before)
        self.steps.append(Call(None if path else cast("Callable[..., Any]", function), path, arguments, results))
        return results[0] if spec.is_leaf() else results

    def replace(
        self, old: fx.Node, new: fx.Node, readers: Collection[fx.Node] | None = None, *, same: bool = False
    ) -> None:
        """Let every reader of ``old`` read ``new``, except the nodes that this editor inserted to compute it.

        With ``readers``, only these: a value that the model uses elsewhere too stays as it is there. ``same``: the new
        value is what the old one was before an edit widened it, so hooks on its module are to see the new one.
        """
        chosen = {user for user in old.users if user not in self.inserted and (readers is None or user in readers)}
        early = min((user for user in chosen if user < new), default=None)
        if early is not None:
            self._hoist(new, early)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user in chosen)
        owner = None if same else self.program.relative_name(self.site.owner)
        follow([b for b in self.program.boundaries if b not in self.called], old, new, owner, readers)
        some = any(user not in self.inserted and user is not new for user in old.users)
        self.steps.append(Replace(old, new, some))

    def discard(self, node: fx.Node, *, inside: bool = False) -> None:
        """Erase a value that nobody reads any more with all that only it needed, random operators included.

        Dead code elimination keeps random operators, for they move the generator on; a rewrite that replaces attention
        means to be rid of them. The other values of the site stay, for later rewrites, masks aside; with ``inside``
        they go too where nobody reads them, and a later rewrite of one is refused.
        """
        values = () if inside else [v for v in self.site.values.values() if not isinstance(v, Masking)]
        kept = {v.node for v in values} - {node}
        kept |= held(self.program.boundaries) | entries(self.program.functions)
        stack = [node]
        while stack:
            dead = stack.pop()
            if dead.op != "call_function" or dead.users or dead in kept | self.erased or writes_for_others(dead):
                continue
            self.erased.add(dead)
            stack.extend(dead.all_input_nodes)
            self.program.graph.erase_node(dead)

    def widen(self, linear: fx.Node, rows: Rows, weight: Callable[[], Any], bias: Callable[[], Any]) -> None:
        """Let ``linear`` yield new features beside its own, laid out as ``rows``; its parameters grow at installation.

        Readers still see the wide value: replace it by its own features. SiteRefusedError if a weight has other uses.
        """
        mode = detect_fake_mode([linear.meta["val"]])
        with mode or torch.no_grad():
            for node, fill in zip(linear.args[1:3], (weight, bias), strict=False):
                if isinstance(node, fx.Node):
                    self._widen(linear, node, rows, fill)
            args = fx.map_arg(linear.args, lambda n: n.meta["val"])
            linear.meta["val"] = cast("Callable[..., Any]", linear.target)(*args)

    def widen_input(self, linear: fx.Node, wide: fx.Node, columns: Rows, weight: Callable[[], Any]) -> None:
        """Let ``linear`` read ``wide``, its operand with new features behind it; its weight grows at installation."""
        own, matrix = cast("tuple[fx.Node, fx.Node]", linear.args[:2])
        with detect_fake_mode([linear.meta["val"]]) or torch.no_grad():
            self._widen(linear, matrix, columns, weight)
        self.replace(own, wide, {linear})

    def _widen(self, linear: fx.Node, node: fx.Node, rows: Rows, fill: Callable[[], Any]) -> None:
        path = str(self.program.path(node))
        uses = self.program.readers(self.program.full_name(path))
        live = self.program.weight(node)
        names = [n for n, p in self.program.module.named_parameters(remove_duplicate=False) if p is live]
        size = node.meta["val"].shape
        taken = live is not None and tuple(live.shape) != tuple(size)
        wrapped = live is not None and is_wrapped(live)
        if uses != [linear] or len(names) != 1 or taken or wrapped:
            used = f"it has {len(uses)} uses under the names {', '.join(names) or 'of a constant'}"
            used = f"it is a {type(live).__name__}, which cannot grow" if wrapped else used
            do = "leave fuse_into out: the gate then has a matrix of its own"
            raise SiteRefusedError(
                f"the matrix {path} cannot take {'columns of a branch' if rows.axis else 'rows of a gate'}",
                where=f"{self.site.owner} {self.site.line}".strip(),
                found=f"it was widened already, to {tuple(size)}" if taken else used,
                do='merge with op="add", or leave this site out' if rows.axis else do,
            )
        node.meta["val"] = node.meta["val"].new_empty((*size[: rows.axis], rows.size, *size[rows.axis + 1 :]))
        self.weights.append((WidenColumns if rows.axis else WidenWeight)(path, rows, fill))

    def pin(self, node: fx.Node, axis: int) -> int:
        """Let the graph hold for the present size of an axis only; other sizes are captured anew."""
        size = node.meta["val"].shape[axis]
        if isinstance(size, int):
            return size
        symbols = size.node.expr.free_symbols
        for i, placeholder in enumerate(self.program.placeholders):
            for j, given in enumerate(placeholder.meta["val"].shape):
                if not isinstance(given, int) and given.node.expr in symbols:
                    self.program.guards.append(f"L['leaves'][{i}].size()[{j}] == {given.node.hint}")
        return int(size.node.hint)

    @property
    def site_node(self) -> fx.Node:
        """A node of the model's own that stands for the site: place and line of inserted nodes are taken from it."""
        own = [v.node for v in self.site.values.values() if v.node.op == "call_function"]
        return own[-1] if own else next(iter(self.site.values.values())).node

    def _first_call(self) -> fx.Node:
        """The last placeholder or get_attr before the first computation: constants go behind it."""
        last = next(iter(self.program.graph.nodes))
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                break
            last = node
        return last

    def _inline(
        self, traced: fx.Graph, path: str, nodes: list[fx.Node], anchor: fx.Node, name: str
    ) -> tuple[fx.Node, ...]:
        parameters = iter(tensor_names(attribute(self.program.module, path)) if path else ())
        values = iter(nodes)
        copied: dict[fx.Node, fx.Node] = {}
        for node in traced.nodes:
            if node.op == "output":
                return tuple(copied[result] for result in cast("tuple[fx.Node, ...]", node.args[0]))
            with self.program.graph.inserting_after(anchor):
                if node.op == "placeholder":
                    parameter = next(parameters, None)
                    if parameter is None:
                        copied[node] = next(values)
                        continue
                    copy = self.program.graph.get_attr(f"{path}.{parameter}")
                else:
                    copy = self.program.graph.node_copy(node, copied.__getitem__)
            self._mark(copy, node, name)
            copied[node] = anchor = copy
        raise AssertionError("a traced graph ends in an output")

    def _call_hooks(
        self, path: str, nodes: list[fx.Node], results: tuple[fx.Node, ...], out: TreeSpec, body: set[fx.Node]
    ) -> None:
        """Note the two sides of a call of a new module that has hooks; its own code, ``body``, read its arguments."""
        slots = {node: Slot(i) for i, node in enumerate(dict.fromkeys(nodes))}
        _, spec = tree_flatten((tuple(nodes), {}))
        entry = Boundary(path, False, spec, tuple(slots[n] for n in nodes))
        entry.values, entry.readers = list(slots), [set[fx.Node | Boundary](body) for _ in slots]
        leaves = tuple(Slot(i) for i, _ in enumerate(results))
        readers = [set[fx.Node | Boundary]() for _ in results]
        leaving = Boundary(path, True, out, leaves, entry, list(results), readers)
        self.called |= {entry, leaving}
        self.program.boundaries += [entry, leaving]

    def _mark(self, copy: fx.Node, source: fx.Node, name: str) -> None:
        place = origin(self.site_node)
        copy.meta = {k: v for k, v in source.meta.items() if k in ("val", "tensor_meta")}
        copy.meta[META] = Origin(self.site.owner, place.call, self.site.line, inserted_by=self.rewrite)
        if "nn_module_stack" in self.site_node.meta:
            copy.meta["nn_module_stack"] = self.site_node.meta["nn_module_stack"]
        if name and copy.op == "call_function":
            copy._rename(name)
        self.inserted.add(copy)

    def _hoist(self, new: fx.Node, early: fx.Node) -> None:
        """Move what ``new`` needs to before ``early``, the first reader of the value that it replaces."""
        needed: set[fx.Node] = set()
        todo = [new]
        while todo:
            node = todo.pop()
            if node < early or node in needed:
                continue
            if node is early or early in node.all_input_nodes or mutates(node):
                raise GraphError(
                    f"the rewrite {self.rewrite} reads a value that depends on the one it replaces",
                    where=f"{self.site.owner} {self.site.line}".strip(),
                    found=f"{node.name} is computed from {early.name}\n{window(node)}",
                    do="gate a later value of the site, or read an earlier source",
                )
            needed.add(node)
            todo.extend(node.all_input_nodes)
        for node in sorted(needed):
            early.prepend(node)
