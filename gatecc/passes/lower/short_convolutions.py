"""short-convolutions: causal convolutions of few taps, each channel by itself, become ``gatecc::short_convolution``.

Of Mamba, gated delta nets, LFM2 and the like, on a CPU, with the SiLU behind them. Inductor transposes to channels
first and reads a weight for every number; the kernel takes tokens as projections leave them. With one thread, 512
channels and 4 taps (AMD EPYC, AVX-512 or held to AVX2) it runs in float32 at 3 times the speed at 128 tokens, at 5 to 7
at 8 and 1024; in bfloat16 at 2.4 and more. With their gradients it is 1.9 times at 8 tokens, 2.6 at 128, 5.1 at 1024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.short_convolution import CausalConvolution, causal_convolution, silu_of, width
from gatecc.ir.ops import mutates, named
from gatecc.ir.program import Program, fake, origin
from gatecc.ir.site import Site
from gatecc.ir.sizes import same
from gatecc.ops.short_convolution import short_convolution
from gatecc.ops.short_convolution.arguments import DTYPES, TAPS
from gatecc.passes.lower.attention.autocast import autocasts
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace as replace_node
from gatecc.passes.lower.restride import restride


class ShortConvolutions(Lowering):
    """silu(conv1d(x, W, b, padding=K - 1)[..., :N]) -> gatecc::short_convolution."""

    name = "short-convolutions"
    left = (
        "channels that do not lie together, autocast; float16 on a CPU; an accelerator, unless it is asked for by name"
    )
    after = ("linear-attention",)  # which looks for convolutions

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        flow = Flow(program)
        for node in list(program.calls()):
            found = causal_convolution(node)
            if found is None:
                continue
            silu = silu_of(found.out, flow)
            what = f"a causal convolution of {width(node)} taps" + ", silu" * (silu is not None)
            place = origin(node)
            at = Outcome(self.name, place.owner, place.line, what)
            reason = _unfit(found, flow, by_name=self.name in (settings.only or ()))
            if not reason and autocasts(program):
                reason = "it may run in another precision than the graph records (autocast)"
            yield replace(at, reason=reason) if reason else self._edit(program, found, silu, flow, at)

    def _edit(
        self, program: Program, found: CausalConvolution, silu: fx.Node | None, flow: Flow, at: Outcome
    ) -> Outcome:
        out = found.out if silu is None else silu
        # States that are read before the convolution go on to be cut out of what was joined.
        states = [n for n in found.states if all(flow.order[reader] > flow.order[out] for reader in n.users)]
        call = _Call("identity" if silu is None else "silu")
        given = (found.x, named(found.conv, "weight"), named(found.conv, "bias"), found.state)
        made = insert(program, self.name, out, call, *given)
        laid_out: tuple[fx.Node, ...] = ()
        for i, old in ((0, out), *((1, node) for node in states)):
            readers = list(old.users)
            old.replace_all_uses_with(made[i])
            if not restride(program, made[i]):  # somebody views the result as it lay before
                laid_out = laid_out or insert(program, self.name, out, replace(call, contiguous=True), *given)
                for reader in readers:
                    reader.replace_input_with(made[i], laid_out[i])
                restride(program, laid_out[i])
        replace_node(program, out, laid_out[0] if laid_out else made[0])
        proof = "the same products are summed" + ", in float32" * (made[0].meta["val"].dtype != torch.float32)
        gain = "no transposition, and each input and weight is read once for 4 tokens"
        return replace(at, became="gatecc::short_convolution", reason=proof, gain=gain)


@dataclass(frozen=True)
class _Call:
    """x: (B, C, N), state: (B, C, K - 1) -> the same shapes, tokens first in memory unless ``contiguous``."""

    activation: str
    contiguous: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> tuple[Tensor, ...]:
        before = None if state is None else state.transpose(1, 2)
        found = short_convolution(x.transpose(1, 2), weight, bias, before, activation=self.activation)
        laid_out = [t.transpose(1, 2) for t in found]
        return tuple(t.contiguous() if self.contiguous else t for t in laid_out)


def _unfit(found: CausalConvolution, flow: Flow, *, by_name: bool) -> str:
    """Why a convolution stays; empty if it need not. ``by_name``: whether the lowering was asked for."""
    x, weight = fake(found.x), fake(named(found.conv, "weight"))
    if x is None or weight is None or (x.device.type != "cpu" and not by_name):
        return (
            "on an accelerator, where nothing was measured, it is Inductor's unless this lowering is asked for by name"
        )
    if x.dtype not in DTYPES.get(x.device.type, ()) or weight.dtype != x.dtype:
        return f"the kernel has no {x.dtype}"
    if width(found.conv) not in TAPS:
        return f"the kernel has {TAPS[0]} to {TAPS[-1]} taps"
    if not same(x.stride(1), 1):
        return "its channels do not lie together"
    if any(mutates(n) or flow.writes_to(n) for n in (found.x, found.conv, found.out)):
        return "a part of it is written to in place"
    return ""


__all__ = ["ShortConvolutions"]
