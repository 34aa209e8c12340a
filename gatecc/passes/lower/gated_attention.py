"""gated-attention: on a GPU fused attention and the gate that multiplies its heads become one call of the operator.

The gate is read where the result is written, so that the heads go to memory once. What else is made of them (a norm of
each head, a gate of another form, a sum) is printed behind the main loop (gatecc.ops.attention.region), unless an
estimate says that it gains nothing: in training the heads are computed again for the gradient. Windows are the
operator's anyway (attention-operator); what torch's kernel serves becomes it only by request
(``options={"gatecc.lowerings": ["gated-attention", ...]}``): no GPU has confirmed that the kernel and the gate together
take less time than torch's kernel and a gate behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import opname
from gatecc.ir.program import Program, fake, origin
from gatecc.ir.site import Attention, Site
from gatecc.ir.sizes import same
from gatecc.ops.attention.printed import Printed, printed_attention
from gatecc.passes.lower.attention_operator import Call, on_gpu, read_call
from gatecc.passes.lower.heads_epilogue import Epilogue, Layout, epilogue_of, in_heads, like, moved
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.regions import fake_mode
from gatecc.passes.lower.replace import replace as replace_node
from gatecc.passes.lower.restride import restride


class GatedAttention(Lowering):
    """SDPA, axes moved, times a gate -> gatecc::attention."""

    name = "gated-attention"
    left = "on a CPU; on a GPU without a window, unless it is asked for by name; epilogues that gain nothing"
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
        behind = epilogue_of(site.core, flow)
        if isinstance(gated, str) and isinstance(behind, str):
            return replace(at, reason=f"{gated}; {behind}")
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
        left = ""
        if not isinstance(behind, str) and not _covers(gated, behind):
            printed = _printed(call, behind, tensors, flow, settings)
            if not isinstance(printed, str):
                words = " ".join(map(opname, behind.computed))
                gain = f"the heads are not written: {1e6 * printed.saved:.1f} us less in a call, an estimate"
                joined = _Followed(call, printed.operator, behind, heads.size(1), heads.size(3))
                _enter(flow.program, self.name, behind.last, joined, [*tensors, *behind.others])
                return replace(
                    at, became=f"{call}, followed by {words} in one kernel", reason=proof, gain=gain, assumes=assumes
                )
            left = f"{' '.join(map(opname, behind.computed))} behind it: {printed}"
        if isinstance(gated, str):
            return replace(at, reason=f"{gated}; {left}")
        if written := _written(tensors, site.core, gated.product, flow):
            return replace(at, reason=f"{written.name} is written to before the gate is read")
        joined = _Joined(replace(call, activation=gated.activation), gated.layout, heads.size(1), heads.size(3))
        _enter(flow.program, self.name, gated.product, joined, [*tensors, gated.gate])
        became = f"{call}, a gate" + f" through {gated.activation}" * (gated.activation != "identity")
        saved = 2 * heads.numel() * heads.element_size() / 1e6 if _fixed(heads.shape) else 0
        what = "the heads are written once" + f", {saved:.1f} MB less to move in a call, an estimate" * bool(saved)
        return replace(at, became=became, reason="; ".join(filter(None, (proof, left))), gain=what, assumes=assumes)


def _enter(program: Program, name: str, old: fx.Node, joined: _Joined | _Followed, given: list[fx.Node]) -> None:
    """The call in the place of a node, laid out as the node was where somebody views it."""
    (made,) = insert(program, name, old, joined, *given)
    readers = list(old.users)
    old.replace_all_uses_with(made)
    if not restride(program, made):  # somebody views the result as it lay before
        (copy,) = insert(program, name, old, replace(joined, contiguous=True), *given)
        for reader in readers:
            reader.replace_input_with(made, copy)
        restride(program, copy)
        made = copy
    replace_node(program, old, made)


def _covers(gated: _Gated | str, behind: Epilogue) -> bool:
    """Whether the operator's own gate is all that is made of the heads."""
    if isinstance(gated, str):
        return False
    own = [gated.product, *(gated.product.all_input_nodes if gated.activation != "identity" else ())]
    return all(n in own for n in behind.computed)


def _printed(call: Call, behind: Epilogue, tensors: list[fx.Node], flow: Flow, settings: Settings) -> Printed | str:
    """The operator of attention and all that is made of its heads, or why there is none."""
    if written := behind.written(flow) or _written(tensors, behind.core, behind.last, flow):
        return f"{written.name} is written to before the last of it is computed"
    heads = fake(behind.core)
    assert heads is not None
    notes = [f"{origin(n).owner} ({origin(n).line}): {opname(n)}" for n in (behind.core, *behind.computed)]
    with fake_mode():
        q, k, v = (like(n, "heads", 0, 0) for n in tensors[:3])
        others = [like(n, behind.layout_of(n), heads.size(1), heads.size(3)) for n in behind.others]
    options: dict[str, Any] = {"scale": call.scale, "causal": call.causal, "window": call.window}
    return printed_attention(behind.function(), (q, k, v), others, notes, training=settings.training, **options)


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
        return _laid_out(out, self.layout, self.contiguous)


@dataclass(frozen=True)
class _Followed:
    """``operator`` in the place of ``call`` and of what follows it."""

    call: Call
    operator: OpOverload
    behind: Epilogue
    heads: int
    width: int
    contiguous: bool = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        bias = given[0][(None,) * (4 - given[0].dim())] if self.call.masked else None
        others = zip(self.behind.others, given[int(self.call.masked) :], strict=True)
        more = [in_heads(x, self.behind.layout_of(n), self.heads, self.width) for n, x in others]
        layout = self.behind.layouts[self.behind.last]
        return _laid_out(self.operator(q, k, v, bias, None, *more)[0], layout, self.contiguous)


def _laid_out(out: Tensor, layout: Layout, contiguous: bool) -> Tensor:
    out = out if layout == "heads" else out.transpose(1, 2)
    out = out.flatten(2) if layout == "flat" else out
    return out.contiguous() if contiguous else out


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
        behind = moved(reader, layout, heads)
        if behind is None:
            return f"no gate multiplies what it yields, {opname(reader)} reads it"
        node, layout = reader, behind
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


__all__ = ["GatedAttention"]
