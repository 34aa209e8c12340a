"""The tables of docs/scale.md, from `gatecc.parallel.estimate`."""

from __future__ import annotations

from collections.abc import Iterator

from gatecc.parallel.estimate import Layers, Sizes, compare
from tools.marks import between, marks

RANKS = (1, 2, 8, 64, 256, 1000)
_WIDTH, _HIDDEN, _LAYERS = 4096, 14336, 32
MODELS = {
    "8 experts of 14,336, 2 for each token (Mistral 7B upcycled: Mixtral)": Sizes(
        (Layers(_LAYERS, 8, 2, _WIDTH, _WIDTH, 8 * 3 * _WIDTH * _HIDDEN),), 1_600_000_000
    ),
    "64 experts of 1,792, 8 for each token (the same layers, split)": Sizes(
        (Layers(_LAYERS, 64, 8, _WIDTH, _WIDTH, 64 * 3 * _WIDTH * _HIDDEN // 8),), 1_600_000_000
    ),
    "64 experts of 1,024, 8 for each token, width 2,048, 16 layers (like OLMoE)": Sizes(
        (Layers(16, 64, 8, 2048, 2048, 64 * 3 * 2048 * 1024),), 500_000_000
    ),
}


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    return between(marks("scale"), page, "\n".join(tables()))


def tables() -> Iterator[str]:
    """One table for each model."""
    for name, sizes in MODELS.items():
        total = (sizes.others + sizes.experts) / 1e9
        yield f"**{name}**, {total:.1f} billion parameters, {sizes.active / 1e9:.1f} for each token:\n"
        head = "ranks", "strategy", "experts over", "KB sent per token", "GB sent per step", "GB held"
        yield f"| {' | '.join(head)} | ms computing | ms sending |"
        yield "|" + " --- |" * 8
        for ranks in RANKS:
            yield from rows(sizes, ranks)
        yield ""


def rows(sizes: Sizes, ranks: int) -> Iterator[str]:
    """Each strategy on so many ranks; the fastest of those that fit is bold."""
    found = list(compare(sizes, ranks))
    fitting = [compute + sending for _, compute, sending, fits in found if fits]
    for way, compute, sending, fits in found:
        best = fits and compute + sending == min(fitting)
        name = f"**{way.strategy}**" if best else way.strategy + ("" if fits else " (does not fit)")
        exchanged = (way.forward + way.backward) / 1e3
        held = (way.held + way.kept) / 1e9
        cells = f"{exchanged:,.0f} | {way.step / 1e9:,.1f} | {held:,.0f} | {compute * 1e3:,.0f} | {sending * 1e3:,.0f}"
        yield f"| {ranks:,} | {name} | {way.expert_ranks} | {cells} |"
