"""arranged: a value in another order of axes, heads and their groups taken apart or put together on the way."""

from __future__ import annotations

from torch import Tensor


def arranged(x: Tensor, have: str, want: str, heads: int = 1, groups: int = 1, repeat: int = 1) -> Tensor:
    """From the axes ``have`` to ``want``, both by their letters (gatecc.ir.axes).

    ``heads``: how many there are in g (batch and heads merged) or c (heads and their width) of ``have``. ``groups``:
    how many query heads share a key head, where r is wanted. ``repeat``: how often each head comes, for keys and values
    that query heads share.
    """
    if "g" in have:
        x, have = x.unflatten(have.index("g"), (-1, heads)), have.replace("g", "bh")
    if "c" in have and "c" not in want:
        x, have = x.unflatten(have.index("c"), (heads, -1)), have.replace("c", "hd")
    if "r" in have and "r" not in want:
        at, have = have.index("r"), have.replace("r", "")
        head = have.index("h")
        x = (x if at == head + 1 else x.movedim(at, head + 1)).flatten(head, head + 1)
    if repeat != 1:
        x = x.repeat_interleave(repeat, have.index("h"))
    if "r" in want and "r" not in have:
        x, have = x.unflatten(have.index("h"), (-1, groups)), have.replace("h", "hr")
    order = [have.index(letter) for letter in want.replace("g", "bh")]
    x = x if order == sorted(order) else x.permute(order)
    return x.flatten(want.index("g"), want.index("g") + 1) if "g" in want else x
