"""The picture of what a run took: a row for each site, a cell for each unit, as dark as it was often taken."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from gatecc.errors import ArgumentError

_ROW, _HEAD, _WIDTH = 0.28, 0.9, 8.0  # inches


@dataclass(frozen=True)
class TakenRow:
    """What a site took of its units: unit i ``counts[i]`` times of ``of`` possible ones. ``units``: their names."""

    site: str
    kind: str
    counts: tuple[int, ...]
    of: int
    units: tuple[str, ...] = ()

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of possible times that each unit was taken."""
        return tuple(count / max(self.of, 1) for count in self.counts)

    @property
    def share(self) -> float:
        """The mean share of its units."""
        return sum(self.shares) / max(len(self.counts), 1)


def picture(rows: Sequence[TakenRow], form: str) -> bytes:
    """The file of a drawing ("png", "svg", "pdf"), one panel for each kind of unit.

    Raises ArgumentError if nothing was chosen, or without matplotlib.
    """
    if not rows:
        raise ArgumentError(
            "there is nothing to draw",
            found="a run in which no exit, block, expert or channel was left out",
            expected="a model whose work depends on values",
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ArgumentError("a picture needs matplotlib", do="pip install 'gatecc[viz]'") from error
    kinds = list(dict.fromkeys(row.kind for row in rows))
    heights = [_HEAD + _ROW * sum(row.kind == kind for row in rows) for kind in kinds]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, squeeze=False, height_ratios=heights)[:, 0]
    for kind, axes in zip(kinds, panels, strict=True):
        own, drawn = [row for row in rows if row.kind == kind], None
        for place, row in enumerate(own):
            shares = row.shares
            drawn = axes.imshow(
                [shares],
                vmin=0,
                vmax=1,
                cmap="viridis",
                aspect="auto",
                interpolation="nearest",
                extent=(0, 1, place + 0.45, place - 0.45),
            )
            axes.text(1.01, place, f"{row.share:.0%}", va="center", fontsize=8)
        axes.set(ylim=(len(own) - 0.5, -0.5), xlim=(0, 1), yticks=range(len(own)), xticks=())
        axes.set_yticklabels([row.site or "(model)" for row in own], fontsize=8)
        counts = sorted({len(row.shares) for row in own})
        axes.set_title(f"{kind}s taken ({', '.join(map(str, counts))} a row)", fontsize=10, loc="left")
        if drawn is not None:
            figure.colorbar(drawn, ax=axes, shrink=0.9, pad=0.08)
    written = io.BytesIO()
    figure.savefig(written, format=form, dpi=120)
    return written.getvalue()
