"""Operands: the values that a rewrite reads at a site, and the readers that it may change."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

import torch
from torch import fx, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.axes import FEATURES
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateShape, GateSpec, Ref, SourceShape
from gatecc.ir.gates.source import Param
from gatecc.ir.program import Program, origin, shape
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Attention, Residual, Site, Value
from gatecc.ir.sizes import described_shape, expression, on_example, size_names, size_text

INPUTS = ("in", "hidden", "hidden_kv")  # stages that others may read as well


def stage(site: Site, name: str) -> Value:
    """A value of the site. Raises SiteRefusedError."""
    value = site.find(name)
    if value is None:
        found, remedy = site.absence(name)
        raise SiteRefusedError(f"the site has no value {name!r}", where=place(site), found=found, do=remedy)
    if not value.axes and shape(value.node):
        raise SiteRefusedError(
            f"the axes of {name!r} are not known here",
            where=place(site),
            found=f"({described_shape(value.node)})",
            do="select another stage, or leave this site out",
        )
    return value


def place(site: Site) -> str:
    """Owner and source line, for messages."""
    return f"{site.owner} {site.line}".strip()


def source(ref: Ref, selector: Selector, edit: Editor, fused: Sequence[Value] = ()) -> Value:
    """What a gate at ``selector``'s stage of the editor's site reads. ``fused``: the values that a fusion weighs."""
    if ref.fused is not None:
        return _numbered(ref.fused, fused)
    if ref.cond is not None:
        return condition(ref.cond, edit.program, stage(edit.site, selector.stage))
    if ref.at is not None:
        return distant(Selector.parse(ref.at), selector, edit)
    return stage(edit.site, selector.stage if ref.stage == "self" else str(ref.stage))


def condition(name: str, program: Program, like: Value) -> Value:
    """An input of the model by its parameter name: a number or vector per sample, or a number per token."""
    for node, path in zip(program.placeholders, program.paths, strict=True):
        if path == (name,) or node.name == name:
            return Value(node, _condition_axes(node, like))
    known = ", ".join(str(path[0]) for path in program.paths)
    raise SiteRefusedError(
        f"the model has no input {name!r}",
        where=program.fqn or type(program.module).__name__,
        found=f"inputs {known}",
        do="name a parameter of the model's forward, and pass it in the example inputs",
    )


def _condition_axes(node: fx.Node, like: Value) -> str:
    sizes = shape(node)
    tokens = next((a for a in like.axes if a in "nm"), "")
    if len(sizes) == 2 and tokens:
        held = node.meta["val"]
        return f"b{tokens}" if not held.is_floating_point() else "bc"
    places = like.axes.positions.text.replace("b", "") if len(sizes) > 2 else ""
    return f"b{places}c"[: len(sizes)]


def _numbered(index: int, values: Sequence[Value]) -> Value:
    if index < len(values):
        return values[index]
    raise ArgumentError(
        f"the gate reads value {index} of a fusion",
        found=f"{len(values)} values" if values else "a rewrite that weighs no values",
        expected=f"a number below {len(values)}" if values else "the rewrite fuse",
    )


def distant(wanted: Selector, selector: Selector, edit: Editor) -> Value:
    """A value of another site: the one that is meant for all, or the k-th for the k-th of the selected sites."""
    found = select(wanted, edit.sites)
    mine = [site.key for site in select(selector, edit.sites)]
    if len(found) not in (1, len(mine)):
        raise SiteRefusedError(
            f"{wanted} is no source for each of {selector}",
            where=place(edit.site),
            found=f"{len(found)} sources, {len(mine)} sites to gate",
            do="select one source for all, or as many as there are sites",
        )
    return stage(found[0] if len(found) == 1 else found[mine.index(edit.site.key)], wanted.stage)


def own_weight(site: Site, program: Program) -> torch.Tensor | None:
    """A weight of the site: what is new there has its device and dtype. Models are of several, quantised ones too.

    Where the site names no weight of its own, a parameter of its owner, or of the nearest module around that has one.
    """
    known = dict(program.module.named_parameters(remove_duplicate=False))
    named = [known.get(program.relative_name(weight.fqn)) for weight in site.weights.values()]
    owner = program.relative_name(site.owner)
    while True:
        around = [p for name, p in known.items() if not owner or f"{name}.".startswith(f"{owner}.")]
        found = next((p for p in (*named, *around) if p is not None and p.is_floating_point()), None)
        if found is not None or not owner:
            return found
        owner = owner.rpartition(".")[0]


def beside(module: nn.Module, edit: Editor) -> nn.Module:
    """A new module on the device and in the dtype of the site's weights."""
    like = own_weight(edit.site, edit.program)
    return module if like is None else module.to(like.device, like.dtype)


def readers(site: Site, name: str) -> Collection[fx.Node] | None:
    """Who reads a stage as a value of this site; None for everyone: the value is the site's own."""
    if isinstance(site, Residual) and name == "skip":
        return {site.add}
    if name not in INPUTS:
        return None
    inside = {u for u in stage(site, name).node.users if _within(origin(u).owner, site.owner)}
    if not inside:
        raise SiteRefusedError(
            f"nothing at the site reads {name!r} directly", where=place(site), do="select another stage"
        )
    return inside


def _within(owner: str, outer: str) -> bool:
    return not outer or owner == outer or owner.startswith(outer + ".")


def source_shape(value: Value) -> SourceShape:
    """Axes and channels of a source. Raises SiteRefusedError where the number of channels changes from call to call."""
    known = static_sizes(value)
    for axis in value.axes:
        if axis in FEATURES and axis not in known:
            raise SiteRefusedError(
                "the source of the gate has no fixed number of channels",
                where=str(origin(value.node).owner),
                found=f"axis {axis} of {_size(value, axis)} differs from call to call",
                expected="a size that is the same in every call",
                do="use a gate that reads nothing (source 'param'), gate stage 'out', or leave this site out",
            )
    return SourceShape(value.axes, prod(size for axis, size in known.items() if axis in FEATURES))


def static_sizes(value: Value) -> dict[str, int]:
    """The sizes of a value's axes that are the same in every call."""
    known = {a: expression(s) for a, s in value.axes.sizes(shape(value.node)).items()}
    return {a: int(s) for a, s in known.items() if s.is_Integer}


def check_tokens(value: Value, site: Site) -> None:
    """Refuse a gate for each token on a value that has none: the scores of attention between channels.

    Raises SiteRefusedError.
    """
    if isinstance(site, Attention) and site.over == "channels" and not value.axes.per_token:
        raise SiteRefusedError(
            "the gated value has channels where the gate has tokens",
            where=place(site),
            found=f"attention between channels: the axes {value.axes} of {value.node.name} count no tokens",
            expected="a gate that is the same for all tokens of a sample",
            do="use the source 'param' or 'pool(hidden)', or gate stage 'heads', which has tokens",
        )


def check_positions(value: Value, sources: Sequence[Value], site: Site) -> None:
    """Refuse a source that counts other places by the value's letter.

    Raises SiteRefusedError.
    """
    mine, tokens = static_sizes(value), _tokens(value)
    for other in sources:
        theirs, its = static_sizes(other), _tokens(other)
        if tokens is not None and its is not None and tokens[1] != its[1]:
            raise SiteRefusedError(
                "the source of the gate has other tokens than the value",
                where=place(site),
                found=f"{tokens[1]} on the example in {value.node.name}, {its[1]} in {other.node.name}: some are no "
                "tokens of the source, such as a learned prefix",
                expected="a token of the source for each of the value",
                do="use a gate that reads what it gates (source 'self'), gate stage 'heads', or leave this site out",
            )
        for axis in set(value.axes.positions) & set(other.axes) - {"b"}:
            sizes = mine.get(axis), theirs.get(axis)
            if sizes[0] != sizes[1] and 1 not in sizes:
                raise SiteRefusedError(
                    "the source of the gate has other positions than the value",
                    where=place(site),
                    found=f"axis {axis} of {_size(value, axis)} and of {_size(other, axis)}",
                    expected="one size",
                    do="use a gate that reads nothing (source 'param'), gate stage 'out', or leave this site out",
                )


def _tokens(value: Value) -> tuple[str, int] | None:
    """The letter of the one axis that counts tokens, and its size on the example; None for windows, flattened tokens
    and the like."""
    letters = value.axes.positions
    if letters not in ("bn", "bm"):
        return None
    found = on_example(shape(value.node)[value.axes.index(letters[1])])
    return None if found is None or found == 1 else (letters[1], found)


def _size(value: Value, axis: str) -> str:
    size = shape(value.node)[value.axes.index(axis)]
    return f"{size_text(size, size_names(value.node.graph))} in {value.node.name}"


def gate_shape(spec: GateSpec, value: Value, sources: Sequence[Value], edit: Editor, experts: int = 0) -> GateShape:
    """The place of a gate. Parameters that vary over tokens pin the graph to the present number of tokens.

    ``experts``: how many there are, for a gate over experts.
    """
    known = static_sizes(value) | ({"e": experts} if experts else {})
    if isinstance(edit.site, Attention) and edit.site.heads:
        known.setdefault("h", edit.site.heads)
    if "e" in value.axes and "e" not in known:  # how many experts a token takes, where it is chosen outside the graph
        known["e"] = edit.pin(value.node, value.axes.index("e"))
    found = GateShape(value.axes, known, tuple(map(source_shape, sources)))
    if isinstance(spec.source, Param):
        for axis in spec.granularity.positions(found):
            known[axis] = edit.pin(value.node, value.axes.index(axis))
    return found
