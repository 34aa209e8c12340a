"""short-convolutions: causal convolutions of few taps, each channel by itself, become ``gatecc::short_convolution``.

Of Mamba, gated delta nets, LFM2 and the like, on a CPU, with the SiLU behind them. Inductor transposes to channels
first and reads a weight for every number; the kernel takes tokens as projections leave them. With one thread, 512
channels and 4 taps (AMD EPYC, AVX-512 or held to AVX2) it runs in float32 at 3 times the speed at 128 tokens, at 5 to 7
at 8 and 1024; in bfloat16 at 2.4 and more. In training they stay: the kernel has no gradient. So do those that read a
state: the step of a decoder is one token.
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
from gatecc.ops.short_convolution import DTYPES, TAPS
from gatecc.passes.lower.attention.autocast import autocasts
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace as replace_node
from gatecc.passes.lower.restride import restride


class ShortConvolutions(Lowering):
    """silu(conv1d(x, W, b, padding=K - 1)[..., :N]) -> gatecc::short_convolution."""

    name = "short-convolutions"
    left = "training, a state in front, channels that do not lie together, an accelerator, float16, autocast"
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
            reason = _unfit(found, flow) or _unfit_here(program, settings)
            yield replace(at, reason=reason) if reason else self._edit(program, found, silu, at)

    def _edit(self, program: Program, found: CausalConvolution, silu: fx.Node | None, at: Outcome) -> Outcome:
        out = found.out if silu is None else silu
        call = _Call("identity" if silu is None else "silu")
        given = [n for n in (found.x, named(found.conv, "weight"), named(found.conv, "bias")) if n is not None]
        (made,) = insert(program, self.name, out, call, *given)
        readers = list(out.users)
        out.replace_all_uses_with(made)
        if not restride(program, made):  # somebody views the result as it lay before
            (laid_out,) = insert(program, self.name, out, replace(call, contiguous=True), *given)
            for reader in readers:
                reader.replace_input_with(made, laid_out)
            made = laid_out
            restride(program, made)
        replace_node(program, out, made)
        proof = "the same products are summed" + ", in float32" * (made.meta["val"].dtype != torch.float32)
        gain = "no transposition, and each input and weight is read once for 4 tokens"
        return replace(at, became="gatecc::short_convolution", reason=proof, gain=gain)


@dataclass(frozen=True)
class _Call:
    """x: (B, C, N) -> the same shape, tokens first in memory unless it is to be ``contiguous``."""

    activation: str
    contiguous: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.ops.gatecc.short_convolution(x.transpose(1, 2), weight, bias, self.activation).transpose(1, 2)
        return y.contiguous() if self.contiguous else y


def _unfit_here(program: Program, settings: Settings) -> str:
    """Why none can be lowered in a program; empty if they can."""
    if settings.training:
        return "it learns, and the kernel has no gradient"
    return "it may run in another precision than the graph records (autocast)" if autocasts(program) else ""


def _unfit(found: CausalConvolution, flow: Flow) -> str:
    """Why a convolution stays, whatever is done with it; empty if it need not."""
    x, weight = fake(found.x), fake(named(found.conv, "weight"))
    if x is None or weight is None or x.device.type != "cpu":
        return "on an accelerator it is Inductor's to fuse"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"the kernel has no {x.dtype}"
    if found.state is not None:
        return "values of a state are in front"
    if width(found.conv) not in TAPS:
        return f"the kernel has {TAPS[0]} to {TAPS[-1]} taps"
    if not same(x.stride(1), 1):
        return "its channels do not lie together"
    if any(mutates(n) or flow.writers.get(flow.base[n]) for n in (found.x, found.conv, found.out)):
        return "a part of it is written to in place"
    return ""


__all__ = ["ShortConvolutions"]
