"""packed-linears: products of one value with several weights become one product, where that is measured to be faster.

On a CPU that is so for narrow ones: a float32 product with fewer than 16 outputs takes about as long as one with twice
as many (gates per head, decays, routers, the inner factors of adapters). Their weights are concatenated in the graph,
at every call: that costs next to nothing, learns, and is never stale. Wide ones (q, k and v; gate and up) gain nothing
there (0.75 to 1.05 times the speed at 1 to 1024 rows and 256 to 4096 outputs). On an accelerator each product is a
launch, so all are packed, under ``gatecc.freeze``, where the concatenation is done once (gatecc.backend.freeze).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch.fx.experimental.symbolic_shapes import optimization_hint

from gatecc.ir.program import Program, fake, origin
from gatecc.ir.site import Site
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings
from gatecc.passes.lower.same_input import Group, groups, pack

NARROW = 16  # outputs: one tile of a float32 product
ROWS = 32  # below, the calls cost more than what they compute


class PackedLinears(Lowering):
    """linear(x, A), linear(x, B) -> split(linear(x, cat(A, B)))."""

    name = "packed-linears"
    left = "16 outputs and more, or 16 bits, on a CPU; on an accelerator without `gatecc.freeze`"
    after = ("adapters",)

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        for group in groups(program):
            packed, reason = _chosen(group, settings)
            place = origin(group.linears[0])
            found = f"products of one value with {', '.join(map(str, group.widths))} outputs"
            if not packed:
                yield Outcome(self.name, place.owner, place.line, found, reason=reason)
                continue
            chosen = group.of(packed)
            pack(program, self.name, chosen, torch.nn.functional.linear)
            became = f"one product with {sum(chosen.widths)} outputs"
            proof = "the weights are concatenated in the graph"
            yield Outcome(self.name, place.owner, place.line, found, became, proof, reason)


def _chosen(group: Group, settings: Settings) -> tuple[list[int], str]:
    """The places of those to pack with what it gains, or none with the reason."""
    x, y = fake(group.linears[0].all_input_nodes[0]), fake(group.linears[0])
    assert x is not None
    assert y is not None
    if x.device.type != "cpu":
        everything = list(range(len(group.linears)))
        if settings.freeze and not settings.training:
            return everything, f"{len(everything) - 1} launches less, an estimate"
        return [], "weights may be packed under options={'gatecc.freeze': True}, without gradients"
    narrow = [i for i, width in enumerate(group.widths) if width < NARROW]
    total = sum(group.widths[i] for i in narrow)
    if y.dtype != torch.float32 or len(narrow) < 2 or total < NARROW:
        return [], f"nothing is gained on a CPU unless several have fewer than {NARROW} outputs each, in float32"
    rows = prod(optimization_hint(size, fallback=ROWS) for size in x.shape[:-1])
    if rows < ROWS:
        return [], f"{rows} rows: nothing is gained on a CPU below {ROWS}"
    return narrow, "about half of the time of these products (measured: 1.7 to 2.4 times as fast on AVX-512)"
