"""The call of the fused operator that takes the place of a spelled-out attention, as a function of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from gatecc.passes.lower.attention.atoms import Atom, Group, Layout, rearrange
from gatecc.passes.lower.attention.operands import Operands
from gatecc.passes.lower.attention.sinks import Sinks
from gatecc.passes.lower.attention.softmax_reading import Hidden, Multiplier, Term


@dataclass(frozen=True, eq=False)
class FusedCall:
    """``terms`` and ``hidden``: what is left of the mask; ``as_boolean``: it may be a boolean one; ``nan_rows``:
    queries that see no key have to yield NaN, as the softmax of nothing does."""

    operands: Operands
    scale: float
    multipliers: Sequence[Multiplier]
    terms: Sequence[Term]
    hidden: Sequence[Hidden]
    causal: bool
    as_boolean: bool
    nan_rows: bool
    floor: float | None
    dropout: float
    dtype: torch.dtype  # of the result
    contiguous: bool = False
    own: bool = False  # by gatecc's operator, which alone has the next three
    softcap: float | None = None
    sinks: Sinks | None = None
    window: int | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """The arguments of the call."""
        o, sinks = self.operands, [] if self.sinks is None or self.sinks.node is None else [self.sinks.node]
        others = (t.node for t in (*self.multipliers, *self.terms, *self.hidden))
        return [o.q.node, o.k.node, o.v.node, *others, *sinks]

    @property
    def grouped(self) -> bool:
        """Whether queries share key heads that are not repeated."""
        batch, o = self.operands.batch, self.operands
        held = [{atom for group in x.layout for atom in group} for x in (o.k, o.v)]
        shares = len(batch) > 1 and all(batch[-1] not in h and batch[-2] in h for h in held)
        return shares and self._of_sinks <= 2

    @property
    def _heads(self) -> Group:
        """The last axes of the batch: as few as there can be, for the others need no common stride. Sinks are of
        heads."""
        batch = self.operands.batch
        count = 2 if self.grouped else int(len(batch) > 1)
        return batch[len(batch) - max(count, self._of_sinks) :]

    @property
    def _of_sinks(self) -> int:
        """How many axes of the batch, from the last, the sinks need."""
        batch, atoms = self.operands.batch, set[Any]() if self.sinks is None else self.sinks.atoms
        return max((len(batch) - i for i, atom in enumerate(batch) if atom in atoms), default=0)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """q, k, v and the tensors of the mask, each as the graph holds it -> what the spelled-out form yields."""
        o, heads = self.operands, self._heads
        outer = o.batch[: len(o.batch) - len(heads)]
        rest = iter(others)
        factors, terms, hidden = (list(islice(rest, len(x))) for x in (self.multipliers, self.terms, self.hidden))
        sizes = _Sizes([(q, o.q.layout), (k, o.k.layout), (v, o.v.layout)])
        want: Layout = (outer, heads)
        key_heads = heads[:1] if self.grouped else heads
        dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        query = rearrange(q, o.q.layout, (*want, o.queries, o.width), sizes)
        key = rearrange(k, o.k.layout, (outer, key_heads, o.keys, o.width), sizes)
        value = rearrange(v, o.v.layout, (outer, key_heads, o.keys, o.v_width), sizes)
        query, key, value = (_cast(x, dtype) for x in (query, key, value))
        for factor, m in zip(factors, self.multipliers, strict=True):
            placed = rearrange(factor, m.layout, (*want, o.queries, o.keys), sizes)
            query = _cast(query / placed if m.divides else query * placed, dtype)
        query, key, value = _spread(query, key, value, self.grouped)
        square: Layout = (*want, o.queries, o.keys)
        added = [_term(x, t, square, sizes) for x, t in zip(terms, self.terms, strict=True)]
        concealed = [
            ~rearrange(x, h.layout, square, sizes) if h.seen else rearrange(x, h.layout, square, sizes)
            for x, h in zip(hidden, self.hidden, strict=True)
        ]
        mask = self._mask(added, concealed, dtype)
        if self.own:
            logits = self._logits(query, next(rest, None), (*want, o.queries, o.keys), sizes)
            result = self._by_own(query, key, value, mask, logits)
        else:
            result = self._by_torch(query, key, value, mask)
        if self.nan_rows and mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > -torch.inf
            result = result.masked_fill(~seen.any(-1, keepdim=True), torch.nan)
        result = _cast(rearrange(result, (*want, o.queries, o.v_width), o.core, sizes), self.dtype)
        return result.contiguous() if self.contiguous else result

    def _by_torch(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout_p=self.dropout,
            is_causal=self.causal,
            scale=self.scale,
            enable_gqa=self.grouped,
        )

    def _by_own(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        options: dict[str, Any] = {"scale": self.scale, "causal": self.causal, "softcap": self.softcap}
        return torch.ops.gatecc.attention(query, key, value, None, mask, sinks, window=self.window, **options)[0]

    def _logits(
        self, query: torch.Tensor, x: torch.Tensor | None, square: Layout, sizes: _Sizes
    ) -> torch.Tensor | None:
        """A logit for each head."""
        if self.sinks is None:
            return None
        if x is None:
            return query.new_full((query.size(1),), self.sinks.number)
        return rearrange(x, self.sinks.layout, square, sizes).reshape(-1).expand(query.size(1))

    def _mask(
        self, added: Sequence[torch.Tensor], concealed: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor | None:
        hidden: torch.Tensor | None = None
        for one in concealed:
            hidden = one if hidden is None else hidden | one
        if not added:
            if hidden is None or self.as_boolean:
                return None if hidden is None else ~hidden
            shown = torch.zeros((), dtype=dtype, device=hidden.device)
            return torch.where(hidden, self._fill(dtype), shown)
        total = added[0]
        for one in added[1:]:
            total = total + one
        if hidden is not None:
            total = total.masked_fill(hidden, self._fill(dtype))
        total = _cast(total, dtype)
        return total if self.floor is None else total.clamp_min(torch.finfo(dtype).min)

    def _fill(self, dtype: torch.dtype) -> float:
        endless = self.floor is None and all(h.fill == -torch.inf for h in self.hidden)
        return -torch.inf if endless or self.as_boolean else torch.finfo(dtype).min


def _spread(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grouped: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give all three one batch and, unless they are grouped, the same heads; by views, without copies."""
    result = query, key, value
    for axis in (0,) if grouped else (0, 1):
        size: Any = next((x.shape[axis] for x in result if not _is_one(x.shape[axis])), 1)
        result = tuple(_expanded(x, axis, size) for x in result)
    return result[0], result[1], result[2]


def _term(x: torch.Tensor, term: Term, square: Layout, sizes: _Sizes) -> torch.Tensor:
    placed = rearrange(x.reshape(term.shape) if term.shape else x, term.layout, square, sizes)
    return placed if term.factor == 1 else placed * term.factor


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _expanded(x: torch.Tensor, axis: int, size: Any) -> torch.Tensor:
    if not _is_one(x.shape[axis]) or _is_one(size):
        return x
    return x.expand(*x.shape[:axis], size, *x.shape[axis + 1 :])


@dataclass(frozen=True, eq=False)
class _Sizes:
    """Sizes that change from call to call, read off the operands."""

    held: Sequence[tuple[torch.Tensor, Layout]]

    def __call__(self, atom: Atom) -> Any:
        for x, layout in self.held:
            for size, group in zip(x.shape, layout, strict=True):
                others = [a for a in group if a is not atom]
                if atom in group and all(a.fixed for a in others):
                    for a in others:
                        size = size // int(a.size)
                    return size
        raise ValueError("a size is known of none of the operands")
