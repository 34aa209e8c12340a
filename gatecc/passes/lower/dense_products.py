"""dense-products: products with weights, and SiLU or GELU behind them, become ``gatecc::linear``, which is oneDNN's.

On a CPU with AVX-512 of AMD, where torch's product is MKL's, oneDNN's is faster: 1.03 to 1.2 times at 256 to 2048 rows
of 256 to 1024 features, 1.2 to 1.5 times at 1024 x 4096. Where nothing was measured, and below the size at which it
gains, all stays as it is: such products are no outcome. In training they stay, too: the operator has no gradient of its
own.

Under ``gatecc.freeze`` products of one value (q, k and v; gate and up) become one where together they are large enough:
their weights are concatenated once (gatecc.backend.freeze), and its parts are views where that is possible. Measured on
Zen 3 (AVX2), 256 rows and three matrices of 1024 x 1024, as times the speed of torch's three: 1.17 as three of
oneDNN's, 1.21 as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.gelu import GELU, by_tanh
from gatecc.ir.ops import RESHAPES, argument, opname
from gatecc.ir.program import Program, fake, origin
from gatecc.ir.site import Site
from gatecc.ops.linear import ROWS, smallest
from gatecc.passes.lower.attention.autocast import autocasts
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.same_input import groups, pack


class DenseProducts(Lowering):
    """act(linear(x, W, b)) -> gatecc::linear."""

    name = "dense-products"
    left = "training, 16 bits, small products, and CPUs on which nothing was measured (all but AMD's)"
    # Others find sites by their projections.
    after = (
        "adapters",
        "attention-operator",
        "causal-mask",
        "expert-modules",
        "experts",
        "gated-attention",
        "linear-attention",
        "packed-linears",
        "regions",
        "spelled-attention",
    )

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        least = None if settings.training or autocasts(program) else smallest()
        if least is None:
            return
        if settings.freeze:
            yield from self._packed(program, least)
        flow = Flow(program)
        activations = dict(_activations(flow))
        for node in list(program.calls()):
            found = None if origin(node).inserted_by == self.name else _product(node)
            if found is None or not _gains(found, least):
                continue
            value, behind = _activated(node, activations, flow)
            place = origin(node)
            activation = behind.name if behind is not None else "identity"
            (made,) = insert(program, self.name, node, _Call(found.turned, activation), *found.operands)
            node.replace_all_uses_with(made)
            if behind is not None:
                behind.root.replace_all_uses_with(made if value is node else value)
            inputs, outputs = found.sizes
            what = f"a product of {inputs} with {outputs} features" + f", {activation}" * (behind is not None)
            reason = "oneDNN computes the same product"
            gain = "faster than torch's product from this size on, measured on this kind of CPU"
            yield Outcome(self.name, place.owner, place.line, what, "gatecc::linear", reason, gain)

    def _packed(self, program: Program, least: int) -> Iterator[Outcome]:
        """Products of one value, as one."""
        flow = Flow(program)
        for group in groups(program):
            products = [_product(node) for node in group.linears]
            fitting = [i for i, found in enumerate(products) if found is not None]
            chosen, (first, *_) = group.of(fitting), [*products, None]
            if len(fitting) < 2 or first is None or not _gains(first, least, sum(chosen.widths)):
                continue
            pack(program, self.name, chosen, torch.ops.gatecc.linear, flow)
            place = origin(group.linears[0])
            found = f"products of one value with {', '.join(map(str, chosen.widths))} outputs"
            reason = "the weights are concatenated once, and again when one has changed; oneDNN computes the same"
            gain = "faster than torch's products of this size together, measured on this kind of CPU"
            became = f"one gatecc::linear with {sum(chosen.widths)} outputs"
            yield Outcome(self.name, place.owner, place.line, found, became, reason, gain)


@dataclass(frozen=True)
class _Activation:
    name: str
    root: fx.Node
    inner: frozenset[fx.Node]


@dataclass(frozen=True)
class _Product:
    """``operands``: x, the weight and perhaps a bias; ``turned``: the weight is (inputs, outputs)."""

    operands: tuple[fx.Node, ...]
    turned: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        a, b = (int(size) for size in self.operands[1].meta["val"].shape)
        return (a, b) if self.turned else (b, a)


@dataclass(frozen=True)
class _Call:
    turned: bool
    activation: str

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ops.gatecc.linear(x, weight.t() if self.turned else weight, bias, self.activation)


def _product(node: fx.Node) -> _Product | None:
    """A product with a matrix of fixed size, in float32 on a CPU."""
    name, args = opname(node), list(node.args)
    if name == "addmm":
        given = [args[1], args[2], args[0]]
        if any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
            return None
    elif name in ("linear", "mm"):
        given = args + [argument(node, 2, "bias")] * (name == "linear" and len(args) == 2)
    else:
        return None
    operands = tuple(a for a in given if isinstance(a, fx.Node))
    held = [fake(a) for a in operands]
    if len(operands) != len([a for a in given if a is not None]) or any(not _plain(h) for h in held):
        return None
    _x, weight, *bias = (h for h in held if h is not None)
    free = any(isinstance(size, torch.SymInt) for size in weight.shape)
    fixed = weight.dim() == 2 and not free and weight.is_contiguous()
    outputs = weight.shape[1 if name != "linear" else 0]
    if not fixed or any(tuple(b.shape) != (outputs,) for b in bias):
        return None
    return _Product(operands, name != "linear")


def _plain(held: torch.Tensor | None) -> bool:
    return held is not None and held.device.type == "cpu" and held.dtype == torch.float32


def _gains(found: _Product, least: int, outputs: int = 0) -> bool:
    """Whether a product is large enough; one with as many ``outputs``, if given."""
    shape = found.operands[0].meta["val"].shape[:-1]
    rows = prod(optimization_hint(size, fallback=0) for size in shape)
    return rows >= ROWS and rows * found.sizes[0] * (outputs or found.sizes[1]) >= least


def _activations(flow: Flow) -> Iterator[tuple[fx.Node, _Activation]]:
    """What is activated, and how."""
    for match in GELU.find(flow).matches:
        name = "gelu_tanh" if by_tanh(match) else "gelu"
        yield match["x"], _Activation(name, match.root, frozenset(match.inner))
    for node in flow.program.calls():
        if opname(node) == "silu" and isinstance(node.args[0], fx.Node):
            yield node.args[0], _Activation("silu", node, frozenset((node,)))


def _activated(node: fx.Node, activations: dict[Any, _Activation], flow: Flow) -> tuple[fx.Node, _Activation | None]:
    """A product, or the last of its views, and the activation that alone reads it."""
    value = node
    while value not in activations and len(value.users) == 1 and opname(next(iter(value.users))) in RESHAPES:
        value = next(iter(value.users))
    found = activations.get(value)
    if found is None or any(user not in found.inner for user in value.users):
        return value, None
    if flow.writers.get(flow.base[node]) or any(flow.writers.get(flow.base[n]) for n in found.inner):
        return value, None
    return value, found


__all__ = ["DenseProducts"]
