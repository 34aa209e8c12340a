"""GateChannels: output channels of convolutions that are on or off for each sample, and computed only where on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx

from gatecc import ops as ops  # registers gatecc::gated_conv
from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.match.nonlinearity import FUNCTIONS
from gatecc.ir.ops import DROPOUTS, SAME_SHAPE, named, opname
from gatecc.ir.program import origin, shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site, Value
from gatecc.passes.gating import gate_node, multiply, read_by
from gatecc.passes.operands import place, stage

_PER_CHANNEL = (
    (FUNCTIONS - frozenset("glu rrelu".split()))
    | DROPOUTS
    | SAME_SHAPE
    | frozenset("batch_norm clamp clamp_min".split())
)
_KEEPS_ZERO = (  # in each channel
    DROPOUTS
    | SAME_SHAPE
    | frozenset("relu relu6 gelu silu hardswish max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d".split())
)


@dataclass(frozen=True)
class GateChannels(Rewrite):
    """Switch the output channels of convolutions on or off for each sample: ``y <- g * act(norm(conv(x)))``.

    The gate must not read what it gates: one number per sample and channel, from ``pool(in)`` or from elsewhere. It
    sits behind the batch norm and the activation that follow the convolution, if there are such: a channel that is off
    is 0 for whoever reads it, and a following convolution does not read it. Training computes every channel, so that
    norms and labels see them all; inference computes those that are on (`gatecc.ops.gated_conv`).

    Grouped convolutions of several channels per group are refused, depthwise ones are not. ``label`` names the gate's
    module on the owner. What is checked: identity, cost, gradient, export, reversible (docs/checks.md).
    """

    name = "gate_channels"

    gate: GateSpec
    label: str = "gate"

    def contract(self) -> Contract:
        return self.gate.contract()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True, whole_model=True)

    def reads(self) -> Iterable[str]:
        return ("in", "out", *read_by(self.gate))

    def rewrite(self, site: Site, edit: Editor) -> None:
        given, out = stage(site, "in"), stage(site, "out")
        options = _options(site, out.node)
        chain = [out.node, *_behind(out.node)]
        gate, _ = gate_node(self.gate, self.site, Value(chain[-1], out.axes), edit, self.label)
        _check_gate(site, gate, out.node)
        if not _reads(gate, chain[-1], edit) and not any(_of_batch(node) for node in chain):
            self._compact(given.node, out.node, gate, options, edit)
            chain.pop(0)
        if chain:
            edit.replace(chain[-1], edit.call(multiply, chain[-1], gate, name=f"{self.label}d"))

    def _compact(self, x: fx.Node, conv: fx.Node, gate: fx.Node, options: dict[str, Any], edit: Editor) -> None:
        """Put the operator in the convolution's place."""
        _, weight, bias = cast("tuple[Any, ...]", conv.args[:3])
        function = partial(_gated_conv, options=options)
        some = edit.call(function, x, weight, gate, bias, _gate_of(x), name=f"{self.label}d_conv")
        edit.replace(conv, some)
        edit.discard(conv)


def _gated_conv(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, inputs: Tensor | None, options: dict[str, Any]
) -> Tensor:
    return torch.ops.gatecc.gated_conv(x, weight, gate, bias, inputs, **options)


def _options(site: Site, conv: fx.Node) -> dict[str, Any]:
    """What the operator has to know of a convolution. Raises SiteRefusedError for those that it does not compute."""
    weight, rank = shape(cast("fx.Node", conv.args[1])), len(shape(conv))
    if rank != len(weight):
        raise _refused(site, f"an input of {rank - 1} axes, which has no samples", "a batch of inputs")
    options: dict[str, Any] = {name: list(named(conv, name)) for name in ("stride", "dilation")}
    options["transposed"] = "transpose" in opname(conv) or bool(named(conv, "transposed", False))
    options["output_padding"] = list(named(conv, "output_padding", [0]))
    options["groups"] = named(conv, "groups")
    padding = named(conv, "padding")
    reach = [d * (k - 1) for d, k in zip(_each(options["dilation"], rank), weight[2:], strict=True)]
    if padding == "same" and any(r % 2 for r in reach):
        raise _refused(site, f'padding="same" of a kernel {tuple(weight[2:])}: more on one side', "padding in numbers")
    options["padding"] = {"same": [r // 2 for r in reach], "valid": [0]}.get(padding) or list(padding)
    for name in ("stride", "dilation", "padding", "output_padding"):
        options[name] = _each(options[name], rank)
    if options["groups"] > 1 and (options["transposed"] or weight[1] > 1):
        per = f"{options['groups']} groups of {weight[int(not options['transposed'])]} input channels"
        raise _refused(site, per, "one group, or a depthwise convolution: groups have to stay equally large")
    return options


def _each(numbers: list[int], rank: int) -> list[int]:
    return numbers * (rank - 2) if len(numbers) == 1 else numbers


def _refused(site: Site, found: str, expected: str) -> SiteRefusedError:
    return SiteRefusedError(
        "channels of this convolution cannot be left out for each sample",
        where=place(site),
        found=found,
        expected=expected,
        do="leave this site out, or multiply its result by the same gate: Gate(site, gate), which skips nothing",
    )


def _check_gate(site: Site, gate: fx.Node, conv: fx.Node) -> None:
    here, wanted = shape(gate), shape(conv)
    if len(here) != len(wanted) or here[1] != wanted[1] or any(size != 1 for size in here[2:]):
        raise SiteRefusedError(
            "the gate is no number per sample and channel",
            where=place(site),
            found=f"({', '.join(map(str, here))}) for a result of {len(wanted)} axes",
            expected='granularity "channel" and a source without places: pool(in, kind=max), cond(NAME), param',
            do="change the gate, or use Gate, which multiplies by any",
        )


def _behind(conv: fx.Node) -> list[fx.Node]:
    """What follows a convolution channel by channel: each node is the only reader of the one before it."""
    found, node = list[fx.Node](), conv
    while len(node.users) == 1:
        (reader,) = node.users
        if opname(reader) not in _PER_CHANNEL or reader.args[0] is not node or shape(reader) != shape(conv):
            break
        found.append(reader)
        node = reader
    return found


def _of_batch(node: fx.Node) -> bool:
    """Whether statistics of the batch enter, which all channels of all samples have to be there for."""
    return opname(node) == "batch_norm" and bool(named(node, "training"))


def _reads(gate: fx.Node, value: fx.Node, edit: Editor) -> bool:
    """Whether a gate depends on what it gates: it learns from labels in this graph, and all is computed anyway."""
    seen, todo = set[fx.Node](), [gate]
    while todo:
        node = todo.pop()
        if node is value:
            return True
        if node in edit.inserted and node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return False


def _gate_of(x: fx.Node) -> fx.Node | None:
    """The gate that an earlier such rewrite put on a value, channel by channel."""
    while opname(x) in _KEEPS_ZERO:
        x = x.all_input_nodes[0]
    if origin(x).inserted_by != GateChannels.name or opname(x) not in ("mul", "gated_conv"):
        return None
    return cast("fx.Node", x.args[1] if opname(x) == "mul" else x.args[2])
