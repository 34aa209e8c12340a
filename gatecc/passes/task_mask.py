"""TaskMask: channels of attention and of feed-forward layers that a task has on or off (gated class-attention)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc import ops as ops  # registers gatecc::masked_linear
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.ops import opname
from gatecc.ir.program import attribute, shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Attention, Site, Value
from gatecc.ir.sizes import described_shape
from gatecc.passes.operands import beside, condition, place, stage

FOR_ALL = -1  # no task is in training: every mask is hard


@dataclass(frozen=True)
class Guard:
    """A matrix whose inputs and outputs masks select, by their names; "" stands for all channels. Paths are relative to
    the module that was captured, ``rows`` are those of the outputs (None: all)."""

    weight: str
    bias: str
    rows: tuple[int, int] | None
    inputs: str
    outputs: str


class TaskMasks(nn.Module):
    """The masks of a site, each with a row of embeddings for each of ``tasks``. task: (B,) -> a mask (B, C) for each.

    In training the mask of the task ``current`` is σ(slope · e); those of the others, and all in eval, are 1[e > 0].
    """

    current: Tensor
    slope: Tensor

    def __init__(self, tasks: int, widths: dict[str, int], start: float, guards: tuple[Guard, ...]) -> None:
        super().__init__()
        self.guards, self.names = guards, tuple(widths)
        for name, width in widths.items():
            self.register_parameter(name, nn.Parameter(torch.full((tasks, width), start)))
        self.register_buffer("current", torch.tensor(FOR_ALL))
        self.register_buffer("slope", torch.tensor(1.0))

    def forward(self, task: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._mask(self.get_parameter(name), task) for name in self.names)

    def _mask(self, table: Tensor, task: Tensor) -> Tensor:
        e = F.embedding(task, table)
        hard = (e > 0).to(e.dtype)
        if not self.training:
            return hard
        return torch.where((task == self.current).unsqueeze(1), torch.sigmoid(self.slope.to(e.dtype) * e), hard)

    def hard(self, name: str) -> Tensor:
        """1[m > 1/2] of every task, (tasks, C)."""
        e = self.get_parameter(name).detach()
        return (e > 0).to(e.dtype)


def on(mask: Tensor) -> Tensor:
    """Which channels have to be computed at all: where the mask, which is multiplied later, is not 0."""
    return (mask != 0).to(mask.dtype)


def all_on(mask: Tensor, width: int) -> Tensor:
    """A mask (B, width) beside another one, with every channel on."""
    return mask.new_ones(mask.size(0), width)


def side_by_side(*masks: Tensor) -> Tensor:
    """The masks of parts of one matrix, (B, C1 + C2 + ...)."""
    return torch.cat(masks, 1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor | None, outputs: Tensor | None) -> Tensor:
    return torch.ops.gatecc.masked_linear(x, weight, bias, inputs, outputs)


@dataclass(frozen=True)
class _Product:
    """A matrix of a site and its masks. ``scaled``: the outputs are multiplied by theirs here, not by a later one."""

    role: str
    inputs: str
    outputs: str
    scaled: bool = True


_ATTENTION = (
    _Product("q", "hidden", "q"),
    _Product("k", "hidden_kv", "k"),
    _Product("v", "hidden_kv", "heads", scaled=False),
    _Product("o", "heads", "out"),
)
_MLP = (
    _Product("up", "", "hidden", scaled=False),
    _Product("gate", "", "hidden", scaled=False),  # of gated forms
    _Product("down", "hidden", "out"),
)


@dataclass(frozen=True)
class TaskMask(Rewrite):
    """Multiply channels of attention, or of a feed-forward layer, by masks m_t, one row of them for each task.

    In attention: what the query projection reads (``hidden``), what those of keys and values read (``hidden_kv``), the
    queries (``q``) and the keys (``k``), as their projections yield them, the result of attention before the output
    projection (``heads``) and behind it (``out``). In a feed-forward layer: ``hidden`` and ``out``. Where queries, keys
    and values are rows of one matrix, ``hidden`` is what it reads.

    ``task`` is the input of the model that numbers the task of each sample, (B,) below ``tasks``. m_t = σ(s e_t) for
    the task in training, whose slope s `gatecc.train.task_training` anneals; 1[m_t > 1/2] for the others, and in eval.
    Every e starts at ``start``: all channels are on. Matrices compute what is on alone (`gatecc::masked_linear`).
    """

    name = "task_mask"

    tasks: int
    task: str = "task"
    start: float = 6.0
    label: str = "task_masks"

    def __post_init__(self) -> None:
        if type(self.tasks) is not int or self.tasks < 1 or not self.start:
            raise ArgumentError(
                "masks are for tasks", found=f"tasks={self.tasks}, start={self.start}", expected="tasks >= 1, start > 0"
            )
        if self.site.kind not in ("attention", "mlp"):
            raise ArgumentError("such a site has no masks", found=str(self.site), expected="attention[...] or mlp[...]")

    def contract(self) -> Contract:
        return identity_at_init() if self.start > 0 else changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True)

    def reads(self) -> Iterable[str]:
        return ("hidden", "heads", "out") if self.site.kind == "attention" else ("hidden", "out")

    def rewrite(self, site: Site, edit: Editor) -> None:
        groups = list(_groups(site, edit))
        task = condition(self.task, edit.program, stage(site, "out"))
        _check_task(task, [linear for linear, _ in groups], site)
        widths = _widths(groups, site)
        guards = tuple(g for _, products in groups for g in _guards(site, products, edit))
        path = edit.module(self.label, lambda: beside(TaskMasks(self.tasks, widths, self.start, guards), edit))
        made = cast("TaskMasks", attribute(edit.program.module, path))
        masks = dict(zip(made.names, edit.call(path, task.node, name=self.label), strict=True))
        for linear, products in groups:
            outputs = [self._outputs(site, linear, p, masks, edit) for p in products]
            joined = outputs[0] if len(outputs) == 1 else edit.call(side_by_side, *outputs, name="masks")
            operands = (*linear.args, None)[:3]
            inputs = masks.get(products[0].inputs)
            new = edit.call(_linear, *operands, inputs, joined, name="masked")
            edit.replace(linear, new)
            edit.discard(linear)

    def _outputs(
        self, site: Site, linear: fx.Node, product: _Product, masks: dict[str, fx.Node], edit: Editor
    ) -> fx.Node:
        """The mask of the outputs of one role."""
        if not product.outputs:
            start, stop = _rows(site, product, linear)
            return edit.call(all_on, next(iter(masks.values())), stop - start, name="on")
        mask = masks[product.outputs]
        return mask if product.scaled else edit.call(on, mask, name="on")


def _groups(site: Site, edit: Editor) -> Iterator[tuple[fx.Node, list[_Product]]]:
    """The products of a site's matrices, each with the roles that it computes, in the order of their rows."""
    found: dict[fx.Node, list[_Product]] = {}
    for product in _ATTENTION if isinstance(site, Attention) else _MLP:
        if product.role == "gate" and "gate" not in site.weights:
            continue
        if product.role == "v" and isinstance(site, Attention) and site.kv_heads != site.heads:
            product = replace(product, outputs="")  # several heads read what a value channel holds
        found.setdefault(_node(site, product.role, edit), []).append(product)
    for node, products in found.items():
        rows = sorted(_rows(site, p, node) for p in products)
        products.sort(key=lambda p: _rows(site, p, node))
        if [start for start, _ in rows] + [shape(node)[-1]] != [0, *(stop for _, stop in rows)]:
            raise _refused(site, f"rows {rows} of one matrix", "rows of queries, of keys and of values, side by side")
        yield node, products


def _rows(site: Site, product: _Product, node: fx.Node) -> tuple[int, int]:
    """The outputs of a product that belong to a role."""
    return site.weights[product.role].rows or (0, int(shape(node)[-1]))


def _node(site: Site, role: str, edit: Editor) -> fx.Node:
    """The product with the matrix of a role. Raises SiteRefusedError for matrices that are read otherwise."""
    if role not in site.weights:
        raise _refused(site, f"weights {', '.join(site.weights) or 'none'}", f"a matrix {role!r} of its own")
    readers = edit.program.readers(site.weights[role].fqn)
    if len(readers) != 1 or opname(readers[0]) != "linear":
        found = ", ".join(f"{r.name} ({opname(r)})" for r in readers)
        raise _refused(site, f"{role} is read by {found or 'nothing'}", "one linear layer that is called once")
    return readers[0]


def _widths(groups: list[tuple[fx.Node, list[_Product]]], site: Site) -> dict[str, int]:
    """How many channels each mask has."""
    found: dict[str, int] = {}
    for linear, products in groups:
        given = shape(cast("fx.Node", linear.args[1]))[1]
        for product in products:
            start, stop = _rows(site, product, linear)
            for name, width in ((products[0].inputs, given), (product.outputs, stop - start)):
                if name and found.setdefault(name, int(width)) != width:
                    raise _refused(site, f"{found[name]} and {width} channels at {name!r}", "as many values as heads")
    return found


def _guards(site: Site, products: list[_Product], edit: Editor) -> Iterator[Guard]:
    for product in products:
        weight = site.weights[product.role]
        bias = edit.program.relative_name(weight.bias) if weight.bias else ""
        name = edit.program.relative_name(weight.fqn)
        yield Guard(name, bias, weight.rows, products[0].inputs, product.outputs)


def _check_task(task: Value, linears: list[fx.Node], site: Site) -> None:
    held = task.node.meta["val"]
    if held.dim() != 1 or held.is_floating_point():
        raise _refused(
            site, f"the input {task.node.name} ({described_shape(task.node)}), {held.dtype}", "(B,) of int64"
        )
    for linear in linears:
        given = shape(cast("fx.Node", linear.args[0]))
        if len(given) < 2 or given[0] != shape(task.node)[0]:
            raise _refused(
                site,
                f"({described_shape(cast('fx.Node', linear.args[0]))}) at {linear.name}",
                "samples first: (B, ..., C)",
            )


def _refused(site: Site, found: str, expected: str) -> SiteRefusedError:
    return SiteRefusedError(
        "the channels of this site cannot have masks for each task",
        where=place(site),
        found=found,
        expected=expected,
        do="select other sites, or gate its values: Gate(site, 'cond(task), lookup(n), channel, sigmoid')",
    )
