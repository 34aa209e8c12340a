"""Whether attention and what is made of its heads is to be one printed kernel (gatecc.ops.attention.region)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload

from gatecc.codegen.regions.blocks import LAUNCH, MAKES
from gatecc.codegen.regions.region import RefusedError
from gatecc.codegen.triton.configs import family
from gatecc.codegen.triton.parts import PARTS
from gatecc.ops.attention.cost import pairs
from gatecc.ops.attention.region import FEW, attention_region

_REACHED = 0.5  # of the peak of matrix units, by attention


class Printed(NamedTuple):
    """``operator(q, k, v, bias, sinks, *others)``, which gives the result and the logsumexp, and the seconds that it
    saves by an estimate."""

    operator: OpOverload
    saved: float


def printed_attention(
    following: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    others: Sequence[Tensor],
    notes: Sequence[str],
    *,
    training: bool,
    **options: Any,
) -> Printed | str:
    """The operator, or why there is none, or why it gains nothing.

    ``tensors``: q, k and v of the sizes of the example, fake ones will do; the other arguments are those of
    ``attention_region``. In inference the heads are not written and read again; in training they are computed again.
    """
    q, k, v = tensors
    B, H, N, D = q.shape
    if N <= FEW:
        return f"{N} queries are a step of a decoder, whose keys are split among programs: the heads are written"
    part = PARTS[MAKES[family()]]
    heads = q.new_empty(B, H, N, v.size(3))
    saved = 2 * heads.numel() * heads.element_size() / part.bandwidth + LAUNCH
    if training:
        seen = B * H * pairs(N, k.size(2), **options)
        again = 2 * seen * (D + v.size(3)) / (_REACHED * part.rate(q.dtype)) + LAUNCH
        if again > saved:
            what = f"{1e6 * again:.1f} us, and {1e6 * saved:.1f} to write and read them"
            return (
                f"in training one kernel computes the heads again for the gradient: {what}, estimates for {part.name}"
            )
    try:
        module: Any = attention_region(following, heads, others, notes, **options)
    except RefusedError as reason:
        return str(reason)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return Printed(module.operator.default, saved)
