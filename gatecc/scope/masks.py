"""Masks: what is known of them where the model makes them, handed down to scopes that are given them as tensors.

A layer's graph proves nothing about a mask that is one of its inputs, nor about a mask of one token, which hides
nothing. The graph of the whole model proves both; what it says is kept on the scope. Where the layer's graph leaves a
mask unknown, the kind that was proved takes its place, and the form of the tensor is asserted on every call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gatecc.ir.mask import Mask
from gatecc.ir.program import Program, shape
from gatecc.ir.site import Attention, Site

UNTOLD = Mask("unknown", reason="the example holds one token, which sees itself whether or not the mask is causal")

Proved = dict[tuple[str, int], Mask]
"""The proved masks of a scope's attention sites by owner (relative to the scope) and ordinal."""


def proved_masks(sites: Iterable[Site], fqn: str) -> Proved:
    """What a larger graph proves about the masks of sites in the scope ``fqn``.

    Nothing of a site whose calls have masks of several kinds. That one token told nothing is known, too.
    """
    found: dict[tuple[str, int], set[Mask]] = {}
    for site in sites:
        if isinstance(site, Attention):
            found.setdefault((relative(site.owner, fqn), site.ordinal), set()).add(_form(site.mask))
    known = {place: masks.pop() for place, masks in found.items() if len(masks) == 1}
    return {place: mask for place, mask in known.items() if mask.kind != "unknown" or mask == UNTOLD}


def relative(owner: str, fqn: str) -> str:
    """The name of a module relative to one that holds it."""
    return owner[len(fqn) :].lstrip(".") if fqn else owner


def handed_down(site: Site, program: Program, proved: Proved) -> Site:
    """The site with the mask that a larger graph proved, as far as the program's own graph leaves it open."""
    known = proved.get((program.relative_name(site.owner), site.ordinal))
    if known is None or not isinstance(site, Attention):
        return site
    mask = site.mask
    if known == UNTOLD:
        return replace(site, mask=known) if mask.kind == "bidirectional" and one_token(site) else site
    if mask.kind == "unknown" and site.maskings and site.mask_whole:
        return replace(site, mask=replace(known, padding=True, asserted=True))
    one = mask.kind == "bidirectional" and known.kind != "bidirectional" and one_token(site)
    if one or (mask.kind == "causal" and known.window is not None):
        return replace(site, mask=replace(mask, kind=known.kind, window=known.window))
    return site


def _form(mask: Mask) -> Mask:
    """What holds for every call: a row may be packed in one and not in another, so both are causal."""
    kind = mask.kind
    if mask == UNTOLD:
        return mask
    if kind == "packed":
        kind = "causal" if mask.window is None else "sliding_window"
    return Mask(kind, mask.window, bias=mask.bias)


def one_token(site: Attention) -> bool:
    """Whether queries and keys are one token each in every call of the graph: such a mask hides nothing."""
    values = [(site.find(name), axis) for name, axis in (("q", "n"), ("k", "m"))]
    sizes = [shape(v.node)[v.axes.index(axis)] for v, axis in values if v is not None and axis in v.axes]
    return len(sizes) == 2 and all(isinstance(size, int) and size == 1 for size in sizes)
