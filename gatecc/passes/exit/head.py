"""Head: the logits of an exit, computed from what a block yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.axes import Axes
from gatecc.ir.edit import Editor
from gatecc.ir.gates.layout import channels_last
from gatecc.ir.gates.option import Option
from gatecc.ir.program import attribute, fake
from gatecc.ir.site import Block, Site, Value
from gatecc.ir.sizes import described_shape, expression
from gatecc.passes.again import again, between
from gatecc.passes.operands import beside, place, stage, static_sizes
from gatecc.passes.route.block import BlockCopy

LABEL = "exit_head"


@dataclass(frozen=True)
class ExitHead(Option, slot="head"):
    """Base of heads."""

    @property
    def reads_tokens(self) -> bool:
        """Whether it must read each token by itself, and cannot do with a row of logits for each sample."""
        return False

    @property
    def pools_tokens(self) -> bool:
        """Whether the logits of one token would depend on others."""
        return False

    def build(self, site: Site, logits: Value, edit: Editor) -> Built:
        """Insert the head at a block site; its logits have the shape of the model's, (b, c) or (b, n, c)."""
        raise NotImplementedError


class Built(NamedTuple):
    """The logits of an exit, and the values that what follows reads."""

    logits: fx.Node
    onward: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Pooled(ExitHead, tag="pooled"):
    """W LN(p), p the mean or maximum of the block's output over tokens or pixels, or its first or last token; ``each``
    token by itself in a model that has logits for each.

    With ``hidden``, W2 GELU(W1 LN(p)) of so many hidden units. Padding is pooled, too.
    """

    pool: Literal["mean", "max", "first", "last", "each"] = "mean"
    hidden: int = 0

    @property
    def reads_tokens(self) -> bool:
        return self.pool == "each"

    @property
    def pools_tokens(self) -> bool:
        return self.pool != "each"

    def check(self) -> None:
        self.require(self.hidden >= 0, "hidden", "a number of units, 0 for none")

    def build(self, site: Site, logits: Value, edit: Editor) -> Built:
        value = stage(site, "out")
        channels, classes = sizes_of(value, logits, site)
        if self.pool in ("first", "last", "each") and value.axes.text != "bnc":
            raise SiteRefusedError(
                f"the block yields no tokens to take {self.pool} of",
                where=place(site),
                found=f"axes {value.axes} of ({described_shape(value.node)})",
                expected="bnc",
                do="take pool='mean' or 'max', or head='tail'",
            )
        made = lambda: beside(PooledHead(self, value.axes, channels, classes), edit)  # noqa: E731
        return Built(edit.call(edit.module(LABEL, made), value.node, name=LABEL), (value.node,))


class PooledHead(nn.Module):
    """The module of `Pooled`. x: (b, ..., c) in the order of ``axes`` -> (b, classes), of each token (b, n, classes)"""

    def __init__(self, head: Pooled, axes: Axes, channels: int, classes: int) -> None:
        super().__init__()
        self.pool, self.axes = head.pool, axes
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, head.hidden) if head.hidden else None
        self.out = nn.Linear(head.hidden or channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool in ("first", "last"):
            x = x[:, 0 if self.pool == "first" else -1]
        elif self.pool != "each":
            x, at = channels_last(x, self.axes, {})
            over = [i for i, axis in enumerate(at) if axis != "b"]
            if over:
                x = x.mean(over) if self.pool == "mean" else x.amax(over)
        x = self.norm(x)
        return self.out(x if self.up is None else F.gelu(self.up(x)))


@dataclass(frozen=True)
class Tail(ExitHead, tag="tail"):
    """The model's own way from its last block to its logits: norm, pooling and classifier, on the block's output.

    Its weights are copied, to be trained, or with ``shared`` the model's own.
    """

    shared: bool = False

    def build(self, site: Site, logits: Value, edit: Editor) -> Built:
        here, last = stage(site, "out").node, stage(_last_block(logits.node, edit), "out").node
        a, b = fake(here), fake(last)
        same = (
            a is not None
            and b is not None
            and a.dtype == b.dtype
            and list(map(expression, a.shape)) == list(map(expression, b.shape))
        )
        if not same:
            raise SiteRefusedError(
                "the model's own head does not fit an earlier block",
                where=place(site),
                found=f"({described_shape(here)}), and ({described_shape(last)}) from the last block",
                expected="one shape",
                do="take a head of its own: head='pooled'",
            )
        own = {} if self.shared else self._copied(last, logits.node, edit)
        return Built(again(edit, {last: here, **own}, logits.node), (here,))

    def _copied(self, last: fx.Node, logits: fx.Node, edit: Editor) -> dict[fx.Node, fx.Node]:
        """Nodes that read the copies of the parameters behind the last block, by those that read the model's."""
        program = edit.program
        nodes = between(program.graph, {last: last}, (logits,))
        read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if program.weight(n) is not None)
        names = {node: str(program.path(node)) for node in read}

        def fill(new: Any, layer: nn.Module) -> None:
            for name, parameter in new.named_parameters():
                parameter.copy_(attribute(layer, name))

        if not names:
            return {}
        path = edit.module(LABEL, lambda: BlockCopy(list(names.values()), program.module), fill)
        return {node: edit.parameter(f"{path}.{name}") for node, name in names.items()}


def sizes_of(value: Value, logits: Value, site: Site) -> tuple[int, int]:
    """The channels that a block yields, and the classes of the model. Raises SiteRefusedError."""
    channels, classes = static_sizes(value).get("c"), static_sizes(logits).get("c")
    if channels is None or classes is None or value.axes.features.text != "c" or not value.axes.text.startswith("b"):
        raise SiteRefusedError(
            "the head of an exit reads samples with channels",
            where=place(site),
            found=f"axes {value.axes} of ({described_shape(value.node)}), logits ({described_shape(logits.node)})",
            expected="axes b and c, of fixed size",
            do="exit at other blocks, or take head='tail'",
        )
    return channels, classes


def _last_block(logits: fx.Node, edit: Editor) -> Site:
    found = [s for s in edit.sites if isinstance(s, Block) and "out" in s.values and s.values["out"].node < logits]
    return max(found, key=lambda s: s.values["out"].node)


def cast(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of the model's logits."""
    return x.to(like.dtype)


def as_logits(early: fx.Node, logits: fx.Node, edit: Editor) -> fx.Node:
    """The head's result in the dtype of the model's."""
    one, other = fake(early), fake(logits)
    same = one is not None and other is not None and one.dtype == other.dtype
    return early if same else edit.call(cast, early, logits, name=LABEL)


def goes_on(stays: Tensor, final: Tensor, early: Tensor) -> Tensor:
    """y <- the later value for those who go on, the other for those who left"""
    return torch.where(stays, final, early)
