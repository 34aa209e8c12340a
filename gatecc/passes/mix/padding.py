"""Padding: the tokens that an attention's mask hides, and the sequences that it keeps apart, as a row for each sample.

Where the graph proves what the mask is, a row of it tells which tokens are padding. Where the mask is given as a tensor
and was proved in a larger graph, its form is asserted on every call.
"""

from __future__ import annotations

from torch import Tensor, fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.program import shape
from gatecc.ir.site import Attention, Masking
from gatecc.ops.sequences import numbers, sequences, visible
from gatecc.passes.operands import place


def token_mask(site: Attention, q: fx.Node, packs: bool, edit: Editor) -> fx.Node | None:
    """(B, N), False at padding; with ``packs`` integers where rows may hold several sequences: 0 at padding, else the
    number of the token's sequence. None if the mask hides no token from all. q: (B, ...).

    Raises SiteRefusedError if the mask is made in a way that does not tell.
    """
    mask = site.mask
    packed = mask.kind == "packed"
    if not (mask.padding or mask.asserted or packed):
        return None
    if not site.mask_whole or not site.maskings or not all(map(_is_told, site.maskings)):
        raise SiteRefusedError(
            "padding cannot be told from the mask",
            where=place(site),
            found=f"the mask is {mask}, made by other operators than where, masked_fill and add",
            expected="tensors (B, heads, N, N), or without heads or batch, that are added to the scores or fill them",
            do="call the model without a padding mask, or leave this site out",
        )
    nodes = [edit.call(_with_batch, m.node) if len(shape(m.node)) == 3 < m.rank else m.node for m in site.maskings]
    hows = tuple(m.how for m in site.maskings)
    form = mask.causal, mask.window or 0, mask.bias
    if mask.asserted:
        return edit.call(asserted, q, hows, packs, *form, *nodes, name="sequence" if packs else "keep")
    if packed:
        return edit.call(numbered, q, hows, *form, *nodes, name="sequence")
    told = diagonal if mask.window or mask.both else last_row
    return edit.call(told, q, hows, mask.bias, *nodes, name="keep")


def _is_told(mask: Masking) -> bool:
    """Whether the axes of a mask are known: where query heads that share a key head have an axis, no more than two."""
    sizes = shape(mask.node)
    return len(sizes) in (2, 3, 4) and (mask.rank <= 4 or all(isinstance(n, int) and n == 1 for n in sizes[:-2]))


def _with_batch(mask: Tensor) -> Tensor:
    """(H or 1, N or 1, N), applied to scores that have an axis for heads -> (1, H or 1, N or 1, N)."""
    return mask.unsqueeze(0)


def asserted(
    q: Tensor, hows: tuple[str, ...], packs: bool, causal: bool, window: int, biased: bool, *masks: Tensor
) -> Tensor:
    """The numbers of sequences (B, N), or False at padding without ``packs``. A mask of another form raises."""
    plain = hows == ("added",) or hows == ("seen",)
    mask = _four_axes(masks[0], q.size(0)) if plain else _seen(q.size(0), hows, biased, masks)
    found = sequences(mask, causal, window, biased=biased, packed=packs).expand(q.size(0), -1)
    return found if packs else found > 0


def numbered(q: Tensor, hows: tuple[str, ...], causal: bool, window: int, biased: bool, *masks: Tensor) -> Tensor:
    """The numbers of sequences (B, N), of masks that are proved to have no other form."""
    found, _ = numbers(_seen(q.size(0), hows, biased, masks)[:, 0], causal, window)
    return found.expand(q.size(0), -1)


def diagonal(q: Tensor, hows: tuple[str, ...], biased: bool, *masks: Tensor) -> Tensor:
    """Which keys see themselves, (B, N): padding does not, also under a window."""
    cut = [_four_axes(m, q.size(0)) for m in masks]
    cut = [(m if m.size(-2) == 1 else m.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)) for m in cut]
    return _seen(q.size(0), hows, biased, cut)[:, 0, 0].expand(q.size(0), -1)


def last_row(q: Tensor, hows: tuple[str, ...], biased: bool, *masks: Tensor) -> Tensor:
    """Which keys the last query sees, (B, N): all but padding, if there is no window."""
    cut = [_four_axes(m, q.size(0))[:, :, -1:] for m in masks]
    return _seen(q.size(0), hows, biased, cut)[:, 0, 0].expand(q.size(0), -1)


def _seen(batch: int, hows: tuple[str, ...], biased: bool, masks: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """(B or 1, H or 1, N or 1, N), True where all masks let a query see a key."""
    result: Tensor | None = None
    for how, mask in zip(hows, masks, strict=True):
        mask = _four_axes(mask, batch)
        seen = ~mask if how == "hidden" else visible(-mask if how == "subtracted" else mask, biased)
        result = seen if result is None else result & seen
    assert result is not None
    return result


def _four_axes(mask: Tensor, batch: int) -> Tensor:
    """(N or 1, N), (B, N or 1, N) or (B * H, N or 1, N) -> (B or 1, H or 1, N or 1, N)."""
    if mask.dim() == 2:
        return mask[None, None]
    if mask.dim() == 3:
        return mask.unsqueeze(1) if mask.size(0) == 1 else mask.unflatten(0, (batch, -1))
    return mask
