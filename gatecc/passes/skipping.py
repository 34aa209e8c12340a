"""Skipping: what a rewrite marks as needed for some samples only, once it is sure that others can do without."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.program import origin, shape
from gatecc.ir.sizes import expression
from gatecc.ir.skipped import Skipped, mark, sees_all, skipped_at
from gatecc.passes.operands import place


def skip_for_samples(node: fx.Node, affected: AbstractSet[fx.Node], edit: Editor, what: str, do: str) -> None:
    """Mark ``where(condition, value, other)``, so that the value is computed for the samples of the condition alone.

    ``affected``: the nodes that are not to run for the others. Where one of them writes to its buffers, as a batch norm
    does in training, all samples go through. Raises SiteRefusedError, beginning with ``what``, if samples cannot be
    told apart, or if something besides the value reads an affected node.
    """
    if (
        any(sees_all(n, affected) for n in affected) or expression(shape(node)[0]) == 0
    ):  # of no samples there is nothing to skip
        return
    found = skipped_at(edit.program, node)
    why = found if isinstance(found, str) else _outside(found, affected)
    if why:
        raise SiteRefusedError(
            f"{what} cannot be skipped for some samples and run for others",
            where=place(edit.site),
            found=why,
            expected=f"{what} of which only the result is read, on an example with two samples or more",
            do=do,
        )
    mark(node)


def _outside(found: Skipped, affected: AbstractSet[fx.Node]) -> str:
    """What others read besides the result; they would read it for all samples."""
    for node in found.given:
        if node in affected:
            reader = next((u for u in node.users if u not in found.inside), None)
            return f"{node.name} {origin(node).line} is read by {reader.name if reader else 'others'}, too"
    return ""
