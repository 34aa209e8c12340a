"""adapters: low-rank adapters on a Linear (Hu et al. 2021), one or several, in the form that costs least.

Three forms compute (W + sum of s B A) x: all factors beside the Linear in two products (with [A1; A2; ...], and with
[s1 B1, s2 B2, ...]), all of them in its weight, or the weight alone where it stays from call to call. Which one the
model has says little: peft writes a pair of products an adapter, training with functional_call adds them to the weight.
Costs are counted as multiply-adds, with numbers that are only written, and tiles of products that are padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import optimization_hint

from gatecc.ir.program import Program, fake, origin, shape
from gatecc.ir.site import Site
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.low_rank import Adapted, adapted
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.replace import replace

WRITTEN = 32  # multiply-adds in the time that a float32 number is written and read again
TILE = 16  # outputs, and rows of the other matrix, that a product has at least
GAIN = 1.03  # below, it is left alone


@dataclass(frozen=True)
class _Costs:
    """Of one call, forward and, in training, backward; multiply-adds."""

    place: Adapted
    rows: int
    training: bool
    kept: bool  # weights stay from call to call

    @property
    def base(self) -> int:
        """Of the Linear alone: in training its input has a gradient too."""
        out, width, _ = self.place.sizes
        return self.rows * out * width * (2 if self.training else 1)

    def beside(self, ranks: Sequence[int]) -> int:
        """Of pairs of products with these ranks."""
        out, width, _ = self.place.sizes
        each = [self.rows * (max(r, TILE) * (out + width) + WRITTEN * out) for r in ranks]
        return sum(each) * (3 if self.training else 1)

    @property
    def together(self) -> int:
        """Of one pair, whose factors are put together."""
        out, width, rank = self.place.sizes
        copies = 0 if self.kept or len(self.place.factors) == 1 else rank * (out + width) * WRITTEN
        return self.beside([rank]) + copies

    @property
    def merged(self) -> int:
        """Of a sum in the weight. Training then wants the gradient of all of the weight."""
        out, width, rank = self.place.sizes
        if self.kept:
            return 0
        learns = self.rows * out * width if self.training and self.place.frozen else 0
        return out * width * (max(rank, TILE) + WRITTEN) * (3 if self.training else 1) + learns


class Adapters(Lowering):
    """W x + s B (A x) + ... and (W + s B A) x -> one of three forms."""

    name = "adapters"
    left = "one adapter in training, or no form that costs less; no sum with the weight after dropout or in 16 bits"

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        for place in list(adapted(program)):
            at, found = origin(place.base), _text(place)
            held = fake(place.base)
            assert held is not None
            kept = settings.freeze and not settings.training
            rows = prod(optimization_hint(size, fallback=1024) for size in shape(place.x)[:-1])
            costs = _Costs(place, rows, settings.training, kept)
            became, gain, reason = _chosen(place, costs, held.dtype)
            if became:
                _write(program, self.name, place, became)
            yield Outcome(self.name, at.owner, at.line, found, became, reason, gain)


def _text(place: Adapted) -> str:
    ranks = ", ".join(str(factor.rank) for factor in place.factors)
    count = len(place.factors)
    where = "in its weight" if place.merged else "beside it"
    return f"a Linear with {count} adapter{'s' if count > 1 else ''} of rank {ranks} {where}"


MERGED, BESIDE = "the sum in its weight", "two products beside it"


def _chosen(place: Adapted, costs: _Costs, dtype: torch.dtype) -> tuple[str, str, str]:
    """The form that it becomes, empty for none; what that saves; and why."""
    forms = {BESIDE: costs.together}
    why = ""
    if any(factor.x is not place.x for factor in place.factors):
        why = "what the adapters read is not what the Linear reads (dropout), so their sum with the weight is another"
    elif dtype not in (torch.float32, torch.float64):
        why = f"a sum with the weight in {dtype} loses digits of the adapters"
    else:
        forms[MERGED] = costs.merged
    now = costs.merged if place.merged else costs.beside([factor.rank for factor in place.factors])
    best = min(forms, key=forms.__getitem__)
    gain = (costs.base + now) / (costs.base + forms[best])
    if gain < GAIN:
        least = f"no other form costs less with {costs.rows} rows, by count of its arithmetic"
        return "", "", f"{least}; {why}" if why else least
    once = ", computed once" if best == MERGED and costs.kept else ""
    return best + once, f"{gain:.2f} times, by count of its arithmetic", "the sum of the same products in another order"


def _write(program: Program, lowering: str, place: Adapted, form: str) -> None:
    """Compute all of it anew: what is added in place to a product has changed it by now."""
    scales = [factor.scale for factor in place.factors]
    count, biased = len(scales), place.bias is not None
    reads = list(dict.fromkeys(factor.x for factor in place.factors))
    own = [place.weight, *(f.a for f in place.factors), *(f.b for f in place.factors)]
    own += [place.bias] if place.bias is not None else []

    def parts(given: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, list[Tensor], Tensor]:
        """The weight, the bias, each A, and all s B side by side."""
        a, b = given[1 : count + 1], [m * s for m, s in zip(given[count + 1 : 2 * count + 1], scales, strict=True)]
        return given[0], given[2 * count + 1] if biased else None, list(a), b[0] if count == 1 else torch.cat(b, 1)

    def merged(x: Tensor, *given: Tensor) -> Tensor:
        weight, bias, a, b = parts(given)
        return F.linear(x, torch.addmm(weight, b, a[0] if count == 1 else torch.cat(a)), bias)

    def beside(x: Tensor, *given: Tensor) -> Tensor:
        weight, bias, a, b = parts(given[len(reads) :])
        if len(reads) == 1:
            thin = F.linear(given[0], a[0] if count == 1 else torch.cat(a))
        else:
            at = [reads.index(factor.x) for factor in place.factors]
            thin = torch.cat([F.linear(given[i], m) for i, m in zip(at, a, strict=True)], -1)
        return F.linear(x, weight, bias) + F.linear(thin, b)

    for node in own:
        if node.op == "get_attr":
            place.base.prepend(node)
    if form.startswith(MERGED):
        (y,) = insert(program, lowering, place.out, merged, place.x, *own)
    else:
        (y,) = insert(program, lowering, place.out, beside, place.x, *reads, *own)
    replace(program, place.out, y)
