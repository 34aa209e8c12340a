"""Duplicates: experts that are the same, of which more have to run than are alike.

Where a mixture has more experts than the data has components, several of them fit one component; the density that a
top-k mixture represents then converges only if k exceeds how many share it (Top-K sparse softmax theory, 2023).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatecc.ir.router import Router

_SAMPLE = 1 << 16  # numbers of an expert that are compared: as many as tell experts apart, however large they are


@dataclass(frozen=True)
class Duplicates:
    """``alike`` of the ``experts`` of a module have a cosine above ``t`` with one of them; ``k`` run for a token."""

    name: str
    experts: int
    alike: int
    k: int | None
    t: float

    @property
    def too_few(self) -> bool:
        """Whether no more experts run than are alike."""
        return self.alike > 1 and (self.k is None or self.alike >= self.k)


@torch.no_grad()
def duplicates(model: nn.Module, t: float = 0.999) -> list[Duplicates]:
    """How many experts of each module with stacked weights (``gate_up_proj`` and ``down_proj``) are alike.

    ``t``: the cosine of their flattened weights above which two are. Weights on the meta device are not looked at.
    """
    found: list[Duplicates] = []
    for name, module in model.named_modules():
        stacks = [cast("Any", module)._parameters.get(key) for key in ("gate_up_proj", "down_proj")]
        if any(not isinstance(s, Tensor) or s.dim() != 3 or s.is_meta for s in stacks):
            continue
        flat = torch.cat([_sampled(s.detach().flatten(1)) for s in stacks], 1).float()
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        alike = int((flat @ flat.T > t).sum(1).max())
        found.append(Duplicates(name, flat.size(0), alike, _k(model, name), t))
    return found


def notes(model: nn.Module, old: Collection[int]) -> Iterator[str]:
    """What a report says of experts that are alike; those whose parameters are not in ``old`` were just made."""
    rows = [row for row in duplicates(model) if row.too_few]
    for new in (True, False):
        chosen = [r for r in rows if (id(model.get_submodule(r.name).get_parameter("down_proj")) not in old) is new]
        for alike, experts, k in sorted({(r.alike, r.experts, r.k or 0) for r in chosen}):
            names = [r.name for r in chosen if (r.alike, r.experts, r.k or 0) == (alike, experts, k)]
            where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            runs = f"and {k} run for a token" if k else "and it is not known how many run for a token"
            if new:
                yield (
                    f"{where}: {alike} of {experts} experts start equal, {runs}; training has to tell them apart "
                    "(noise, a random router): gatecc.diagnose.duplicates(model) says whether it did"
                )
            else:
                yield (
                    f"{where}: {alike} of {experts} experts are the same (cosine above {rows[0].t}), {runs}: more must "
                    "run than are alike, or fewer experts would do"
                )


def _sampled(x: Tensor) -> Tensor:
    return x[:, :: max(1, x.size(1) // _SAMPLE)]


def _k(model: nn.Module, name: str) -> int | None:
    """How many experts run: slots of the router beside, or what the block of transformers says."""
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    beside = next((m for m in parent.children() if isinstance(m, Router)), None)
    if beside is not None:
        return beside.slots
    for holder in (parent, getattr(parent, "gate", None), getattr(parent, "router", None)):
        for key in ("top_k", "num_experts_per_tok"):
            if isinstance(k := getattr(holder, key, None), int):
                return k
    return None
