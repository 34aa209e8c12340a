"""Block: a whole block becomes k of E for each sample, or is skipped; those that a sample does not take do not run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.program import Program, attribute, fake, origin
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.ir.site import Site, Value
from gatecc.ir.skipped import needed_by, sees_all
from gatecc.passes.operands import place, source, source_shape, stage
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.router_nodes import router_nodes
from gatecc.passes.samples import check_one_row, hits, over, weight_of
from gatecc.passes.skipping import skip_for_samples

_SHOWN = "leave out what shows the inside (use_cache=False, output_attentions=False), or route the MLPs inside of it"


def per_sample(x: Tensor) -> Tensor:
    """A row for each sample. x: (b, ...) -> (b,)"""
    return x.new_zeros(x.size(0))


def chosen(indices: Tensor, x: Tensor, number: int) -> Tensor:
    """Whether a sample takes an expert. indices: (b, k), x: (b, ...) -> (b, 1, ...) of bool"""
    return over(hits(indices, number).any(1), x)


def where(condition: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """y <- value where the sample takes the expert, else what entered the block"""
    return torch.where(condition, value, other)


def mixed(x: Tensor, weights: Tensor, indices: Tensor, *results: Tensor) -> Tensor:
    """y <- sum_e w_e f_e(x) + (1 - sum_e w_e) x, in float32 or wider; w_e = 0 where a sample does not take e"""
    wide = torch.promote_types(x.dtype, torch.float32)
    each = [over(weight_of(weights, hits(indices, e)).to(wide), x) for e in range(len(results))]
    parts = [w * y.to(wide) for w, y in zip(each, results, strict=True)]
    return (sum(parts) + (1 - sum(each)) * x.to(wide)).to(x.dtype)


class BlockCopy(nn.Module):
    """The parameters and buffers of another block, under the names that they have there. It is read, not called."""

    def __init__(self, names: list[str], block: nn.Module) -> None:
        super().__init__()
        for name in names:
            holder: nn.Module = self
            *steps, last = name.split(".")
            for step in steps:
                if step not in holder._modules:
                    holder.add_module(step, nn.Module())
                holder = holder.get_submodule(step)
            value = attribute(block, name)
            if isinstance(value, nn.Parameter):
                holder.register_parameter(last, nn.Parameter(torch.empty_like(value), value.requires_grad))
            else:
                holder.register_buffer(last, value.clone())


def route_block(router: RouterSpec, experts: Copies, options: int, at: Selector, label: str, edit: Editor) -> None:
    """Route a block site. Expert 0 is the block itself; index ``experts.count`` and empty slots are the identity."""
    given, out = stage(edit.site, "in"), stage(edit.site, "out")
    _check_values(given, out, edit.site)
    rows = Value(edit.call(per_sample, given.node, name="per_sample"), "b")
    shapes = [source_shape(source(ref, at.in_, edit)) for ref in router.sources]
    check_one_row(router, shapes, "a block")
    weights, indices = router_nodes(router, options, at, rows, edit)
    results = [out.node, *_copies(experts, out.node, given.node, label, edit)]
    kept: list[fx.Node] = []
    for number, result in enumerate(results):
        condition = edit.call(chosen, indices, given.node, number, name=f"takes_{number}")
        kept.append(edit.call(where, condition, result, given.node, name=f"expert_{number}"))
    y = edit.call(mixed, given.node, weights, indices, *kept, name="routed")
    edit.replace(out.node, y)
    affected = _affected(given.node, edit.site)
    for node in kept:
        skip_for_samples(node, affected, edit, "the block", _SHOWN)


def _check_values(given: Value, out: Value, site: Site) -> None:
    one, other = fake(given.node), fake(out.node)
    fits = one is not None and other is not None and one.dtype == other.dtype
    if not fits or not given.axes.text.startswith("b") or given.axes != out.axes:
        raise SiteRefusedError(
            "the block does not map samples to samples",
            where=place(site),
            found=f"axes {given.axes} in and {out.axes} out",
            expected="samples as the first axis, b, of one dtype on both sides",
            do="route the MLPs inside of it",
        )


def _copies(experts: Copies, out: fx.Node, given: fx.Node, label: str, edit: Editor) -> list[fx.Node]:
    """The results of the further experts: the computations of the block once more, with parameters of their own."""
    if experts.count == 1:
        return []
    program = edit.program
    inside = sorted(needed_by(out))
    if writing := next((n for n in _affected(given, edit.site) if sees_all(n)), None):
        raise SiteRefusedError(
            "copies of a block that writes to its buffers would all write to the same ones",
            where=place(edit.site),
            found=f"{writing.name}, such as the running statistics of a batch norm in training",
            do="choose between the block and nothing: copies(1) with skip=True",
        )
    prefix = program.relative_name(edit.site.owner)
    read = dict.fromkeys(n for node in inside for n in node.all_input_nodes if n.op == "get_attr")
    names = {node: str(node.target)[len(prefix) :].lstrip(".") for node in read if _own(program, node, prefix)}

    def build() -> nn.Module:
        block = program.module.get_submodule(prefix)
        return nn.ModuleDict({str(e): BlockCopy(list(names.values()), block) for e in range(1, experts.count)})

    def fill(new: Any, layer: nn.Module) -> None:
        for copy in new.values():
            for name, parameter in copy.named_parameters():
                old = attribute(layer, f"{prefix}.{name}".lstrip("."))
                parameter.copy_(old)
                if experts.noise:
                    parameter.add_(torch.randn_like(parameter) * (experts.noise * old.float().std(unbiased=False)))

    path = edit.module(label, build, fill)
    made: list[fx.Node] = []
    for e in range(1, experts.count):
        own = {node: edit.parameter(f"{path}.{e}.{name}") for node, name in names.items()}
        made.append(edit.duplicate(inside, own)[out])
    return made


def _own(program: Program, node: fx.Node, prefix: str) -> bool:
    """Whether a node reads a parameter or buffer of the block. Raises SiteRefusedError for one that is computed."""
    held = program.weight(node)
    if held is None or not f"{node.target}.".startswith(f"{prefix}." if prefix else ""):
        return False
    known = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
    if str(node.target) not in known and not isinstance(held, nn.Parameter):
        raise SiteRefusedError(
            "a weight of the block is computed from others, and a copy of it would not be",
            where=program.full_name(str(node.target)),
            do="torch.nn.utils.parametrize.remove_parametrizations first, or choose between the block and nothing",
        )
    return True


def _affected(given: fx.Node, site: Site) -> set[fx.Node]:
    """What in the block depends on the numbers that enter it, sizes aside."""
    found, todo = set[fx.Node](), [given]
    while todo:
        for user in todo.pop().users:
            number = isinstance(user.meta.get("val"), torch.SymInt)
            if user not in found and not number and user.op == "call_function" and _of_block(user, site):
                found.add(user)
                todo.append(user)
    return found


def _of_block(node: fx.Node, site: Site) -> bool:
    at = origin(node)
    return not at.inserted_by and (not site.owner or f"{at.owner}.".startswith(f"{site.owner}."))
