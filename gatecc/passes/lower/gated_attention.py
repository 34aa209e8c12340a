"""gated-attention: on a GPU fused attention and the gate that multiplies its heads become one call of the operator.

The gate is read where the result is written, so that the heads go to memory once. Windows are the operator's anyway
(attention-operator); what torch's kernel serves becomes it only by request
(``options={"gatecc.lowerings": ["gated-attention", ...]}``): no GPU has confirmed that the kernel and the gate together
take less time than torch's kernel and a gate behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import SAME_SHAPE, opname
from gatecc.ir.program import Program, fake
from gatecc.ir.site import Attention, Site
from gatecc.ir.sizes import same
from gatecc.passes.lower.attention_operator import Call, on_gpu, read_call
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace as replace_node
from gatecc.passes.lower.restride import restride

Layout = Literal["heads", "tokens", "flat"]
"""Of a result where it meets its gate: (B, H, N, E), (B, N, H, E), (B, N, H E)."""
_FLATTENS = frozenset("view reshape _unsafe_view flatten".split())


class GatedAttention(Lowering):
    """SDPA, axes moved, times a gate -> gatecc::attention."""

    name = "gated-attention"
    left = "on a CPU; on a GPU without a window, unless it is asked for by name"
    after = ("causal-mask", "spelled-attention")

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        fused = [s for s in sites if isinstance(s, Attention) and s.spelling == "sdpa" and on_gpu(s.core)]
        flow = Flow(program) if fused else None
        for site in fused:
            gated = _gate_of(site.core)
            asked = settings.only is not None and self.name in settings.only
            if flow is not None and (asked or not isinstance(gated, str)):
                yield self._at(site, gated, flow, settings, asked)

    def _at(self, site: Attention, gated: _Gated | str, flow: Flow, settings: Settings, asked: bool) -> Outcome:
        at = Outcome(self.name, site.owner, site.line, f"fused attention, {site.mask}")
        if isinstance(gated, str):
            return replace(at, reason=gated)
        found = read_call(site, flow, settings)
        if isinstance(found, str):
            return replace(at, reason=found)
        call, assumes, proof = found
        if not asked and call.window is None:
            return replace(
                at, reason="a gate joins torch's fused attention by request alone: no GPU has confirmed a gain"
            )
        heads = fake(site.core)
        assert heads is not None
        tensors = [n for n in site.core.args[: 4 if call.masked else 3] if isinstance(n, fx.Node)]
        if written := _written(tensors, site.core, gated.product, flow):
            return replace(at, reason=f"{written.name} is written to before the gate is read")
        joined = _Joined(replace(call, activation=gated.activation), gated.layout, heads.size(1), heads.size(3))
        (made,) = insert(flow.program, self.name, gated.product, joined, *tensors, gated.gate)
        readers = list(gated.product.users)
        gated.product.replace_all_uses_with(made)
        if not restride(flow.program, made):  # somebody views the result as it lay before
            laid_out = replace(joined, contiguous=True)
            (copy,) = insert(flow.program, self.name, gated.product, laid_out, *tensors, gated.gate)
            for reader in readers:
                reader.replace_input_with(made, copy)
            restride(flow.program, copy)
            made = copy
        replace_node(flow.program, gated.product, made)
        became = f"{call}, a gate" + f" through {gated.activation}" * (gated.activation != "identity")
        saved = 2 * heads.numel() * heads.element_size() / 1e6 if _fixed(heads.shape) else 0
        what = "the heads are written once" + f", {saved:.1f} MB less to move in a call, an estimate" * bool(saved)
        return replace(at, became=became, reason=proof, gain=what, assumes=assumes)


@dataclass(frozen=True)
class _Gated:
    """Where a result meets its gate: the product, the gate before its activation, how the result lies there."""

    product: fx.Node
    gate: fx.Node
    activation: str
    layout: Layout


@dataclass(frozen=True)
class _Joined:
    """``call`` with a gate that lies as the result is to lie."""

    call: Call
    layout: Layout
    heads: int
    width: int
    contiguous: bool = False

    def __call__(self, *tensors: Tensor) -> Tensor:
        *others, gate = tensors
        if self.layout == "flat":
            gate = gate.unflatten(-1, (self.heads, self.width))
        run: Callable[..., Tensor] = self.call
        out = run(*others, gate if self.layout == "heads" else gate.transpose(1, 2))
        out = out if self.layout == "heads" else out.transpose(1, 2)
        out = out.flatten(2) if self.layout == "flat" else out
        return out.contiguous() if self.contiguous else out


def _gate_of(core: fx.Node) -> _Gated | str:
    """The gate behind a fused attention, or why there is none."""
    heads = fake(core)
    if heads is None or heads.dim() != 4 or not _fixed((heads.size(1), heads.size(3))):
        return "the heads are not an axis of a known size"
    node, layout = core, "heads"
    while True:
        if len(node.users) != 1:
            return "what it yields is read by several"
        (reader,) = node.users
        if opname(reader) == "mul":
            break
        moved = _moved(reader, layout, heads)
        if moved is None:
            return f"no gate multiplies what it yields, {opname(reader)} reads it"
        node, layout = reader, moved
    gate = reader.args[1] if reader.args[0] is node else reader.args[0]
    value, product = fake(gate) if isinstance(gate, fx.Node) else None, fake(reader)
    if not isinstance(gate, fx.Node) or value is None or product is None or gate is node:
        return "what it yields is multiplied with a number"
    if product.dtype != heads.dtype or not value.is_floating_point():
        return "the gate changes the dtype"
    there = fake(node)
    assert there is not None
    widths = (there.size(-1),) if layout == "flat" else (there.size(-1), 1)
    if value.dim() != there.dim() or not all(map(same, value.shape[:-1], there.shape[:-1])):
        return "the gate is broadcast over more than channels"
    if not any(same(value.size(-1), width) for width in widths):
        return "the gate is broadcast over more than channels"
    if opname(gate) in ("sigmoid", "silu") and isinstance(gate.args[0], fx.Node) and len(gate.users) == 1:
        return _Gated(reader, gate.args[0], opname(gate), layout)
    return _Gated(reader, gate, "identity", layout)


def _fixed(sizes: Iterable[object]) -> bool:
    """Whether sizes are the same in every call."""
    return all(isinstance(size, int) for size in sizes)


def _written(tensors: Sequence[fx.Node], core: fx.Node, product: fx.Node, flow: Flow) -> fx.Node | None:
    """A tensor that is another one where the product stands than it was for the fused attention."""
    order = flow.order
    for node in tensors:
        if any(order[core] < order[w] < order[product] for w in flow.writers.get(flow.base[node], ())):
            return node
    return None


def _moved(node: fx.Node, layout: Layout, heads: Tensor) -> Layout | None:
    """How the result lies behind an operator that moves it; None if it does anything else."""
    name, value = opname(node), fake(node)
    if value is None:
        return None
    if name in SAME_SHAPE - {"detach"}:
        return layout
    if layout == "heads" and name == "transpose" and {a % 4 for a in node.args[1:3] if isinstance(a, int)} == {1, 2}:
        return "tokens"
    if layout == "heads" and name == "permute" and node.args[1] in ([0, 2, 1, 3], (0, 2, 1, 3)):
        return "tokens"
    if layout == "tokens" and name in _FLATTENS and value.dim() == 3:
        whole = same(value.size(0), heads.size(0)) and same(value.size(1), heads.size(2))
        return "flat" if whole and same(value.size(2), heads.size(1) * heads.size(3)) else None
    return None


__all__ = ["GatedAttention"]
