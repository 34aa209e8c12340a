"""``gatecc::sequences``: the sequences that an attention mask lets tokens belong to, and the assertion that it has no
other form.

A submodule is given its mask as a tensor: what was proved where the model makes it (causal or not, a window) holds for
the submodule as long as the tensor has that form, with padding, and with several sequences packed into a row. What puts
something else in the place of softmax attention reads both from the mask here, and never goes on with another mask.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from gatecc.errors import MaskFormError

HIDDEN = -50.0  # a score that lies this far below the others is hidden: exp(-50) is 2e-22
_MASKED = -9e3  # a bias is no number below that
_KEPT = 8  # results a thread remembers: the layers of a model share their masks
_LIBRARY = torch.library.Library("gatecc", "FRAGMENT")
_LIBRARY.define("sequences(Tensor mask, bool causal, int window, bool biased, bool packed) -> Tensor")


def sequences(
    mask: Tensor, causal: bool, window: int | None = None, *, biased: bool = False, packed: bool = True
) -> Tensor:
    """mask: (B or 1, 1 or H, N or 1, N) -> (B or 1, N) integers: 0 at padding, else the number of the token's sequence.

    ``mask`` is boolean (True: the query sees the key), or added to scores: 0, or below -50 where a key is hidden.
    Sequences of a row are numbered from 1. A query must see the keys of its own sequence, padding left out: all of
    them, or with ``causal`` itself and the earlier ones, the last ``window`` of these if there is a window. What a
    padding token sees does not matter; it is one that does not see itself. ``biased``: finite values are added to
    scores as well. Without ``packed`` a row holds one sequence.

    Raises MaskFormError if the mask has another form. Plain calls remember their results: the layers of a model share
    a mask.
    """
    return torch.ops.gatecc.sequences(mask, causal, window or 0, biased, packed)


def visible(mask: Tensor, biased: bool = False) -> Tensor:
    """Where a query sees a key, in the shape of the mask. Beside a bias, what is hidden lies far below all that is not:
    models hide by -1e4, -1e9, -1e30 or the least number that there is."""
    if mask.dtype == torch.bool or not biased:
        return mask if mask.dtype == torch.bool else mask == 0
    least = mask.amin().clamp_min(torch.finfo(mask.dtype).min)
    return mask > torch.where(least < _MASKED, least / 2, -torch.inf)


def numbers(seen: Tensor, causal: bool, window: int) -> tuple[Tensor, Tensor]:
    """seen: (B, N or 1, N) -> the sequences (B, N), and where the mask has another form than these say, like seen.

    A token belongs to the sequence of the one before it, padding left out, if it sees it.
    """
    tokens = seen.size(-1)
    if seen.size(-2) != tokens:  # one row for all queries: padding alone
        keep = seen[:, 0]
        return keep.long(), seen & torch.full_like(seen, causal)
    keep = seen.diagonal(dim1=-2, dim2=-1)
    at = torch.arange(tokens, device=seen.device)
    last = torch.where(keep, at, -1).cummax(-1).values
    before = torch.nn.functional.pad(last[:, :-1], [1, 0], value=-1)
    joined = seen.gather(-1, before.clamp_min(0).unsqueeze(-1)).squeeze(-1) & (before >= 0)
    number = (keep & ~joined).cumsum(-1) * keep
    wanted = number.unsqueeze(-1) == number.unsqueeze(-2)
    wanted = wanted.tril() if causal else wanted
    wanted = wanted.triu(1 - window) if window else wanted
    nobody = ~keep.any(-1)[:, None, None]  # sees itself: such a row is padding alone, and hides everything
    return number, ((wanted != seen) & keep.unsqueeze(-1)) | (seen & nobody)


def _kernel(mask: Tensor, causal: bool, window: int, biased: bool, packed: bool) -> Tensor:
    if mask.is_inference():  # it has no version: whether it was changed since cannot be told
        return _checked(mask, causal, window, biased, packed)
    owner = mask._base if mask._is_view() and mask._base is not None else mask
    how = (owner._version, mask.shape, mask.stride(), mask.storage_offset(), causal, window, biased, packed)
    known = _remembered()
    for place, then, result in known:
        if then == how and place() is owner:
            return result
    result = _checked(mask, causal, window, biased, packed)
    known.insert(0, (weakref.ref(owner), how, result))
    del known[_KEPT:]
    return result


_THREAD = threading.local()


def _remembered() -> list[tuple[weakref.ref[Tensor], Any, Tensor]]:
    """This thread's results, the newest first."""
    return vars(_THREAD).setdefault("known", [])


def _checked(mask: Tensor, causal: bool, window: int, biased: bool, packed: bool) -> Tensor:
    _check_shape(mask)
    shown = visible(mask, biased)
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        number, wrong = _everywhere(mask, shown, causal, window, biased)
        bad = wrong.any() if packed else wrong.any() | (number > 1).any()
        torch.ops.aten._assert_async.msg(~bad, f"{MaskFormError.code} an attention mask has another form than proved")
        return number
    usual = _usual(mask, shown, causal, window, biased)
    if usual is not None:
        return usual
    number, wrong = _everywhere(mask, shown, causal, window, biased)
    if bool(wrong.any()) or not (packed or bool((number <= 1).all())):
        raise _error(mask, number, wrong, causal, window)
    return number


def _usual(mask: Tensor, shown: Tensor, causal: bool, window: int, biased: bool) -> Tensor | None:
    """The sequences of a mask without packed rows, made from positions and padding alone; None for others.

    Nearly all masks are so, and this takes a few passes over bytes.
    """
    rows, tokens = mask.shape[-2:]
    if mask.size(1) != 1 or rows != tokens or not (mask.dtype == torch.bool or biased or _binary(mask, shown)):
        return None
    seen = shown[:, 0]
    keep = seen.diagonal(dim1=-2, dim2=-1).contiguous()
    wanted = _near(tokens, causal, window, mask.device) & keep.unsqueeze(-2)
    return keep.long() if torch.equal(wanted, seen) else None


def _binary(mask: Tensor, shown: Tensor) -> bool:
    """Whether scores are 0 or hidden."""
    return not shown.numel() or bool(mask.masked_fill(shown, -torch.inf).amax() < HIDDEN)


def _near(tokens: int, causal: bool, window: int, device: torch.device) -> Tensor:
    """(N, N), True where a query may see a key by their places."""
    near = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    near = near.tril() if causal else near
    return near.triu(1 - window) if window else near


def _everywhere(mask: Tensor, shown: Tensor, causal: bool, window: int, biased: bool) -> tuple[Tensor, Tensor]:
    """The sequences, and where (B, N or 1, N) the mask has another form."""
    seen = shown[:, 0]
    number, wrong = numbers(seen, causal, window)
    of_queries = number.unsqueeze(-1) > 0 if seen.size(-2) == seen.size(-1) else number.new_ones(1, 1, 1).bool()
    if mask.dtype != torch.bool and not biased:
        wrong = wrong | (~seen & ~(mask[:, 0] < HIDDEN) & of_queries)
    if shown.size(1) > 1:
        wrong = wrong | ((shown != shown[:, :1]).any(1) & of_queries)
    return number, wrong


def _check_shape(mask: Tensor) -> None:
    if mask.dim() != 4 or mask.size(-2) not in (1, mask.size(-1)):
        raise MaskFormError(
            "an attention mask does not have a row for each query",
            found=f"the shape {tuple(mask.shape)}",
            expected="(batch, heads, tokens, tokens), or 1 in the place of batch, heads or queries",
            do="call the model without a KV cache (use_cache=False)",
        )


def _error(mask: Tensor, number: Tensor, wrong: Tensor, causal: bool, window: int) -> MaskFormError:
    form = "each token to see itself and the earlier tokens" if causal else "each token to see all tokens"
    form += f" (the last {window})" if window else ""
    if not bool(wrong.any()):
        row = int((number > 1).any(-1).nonzero()[0, 0])
        return MaskFormError(
            "several sequences are packed into one row, which this rewrite cannot keep apart",
            found=f"{int(number[row].max())} sequences in row {row} of the mask",
            expected="one sequence in each row, and padding",
            do="give each sequence a row of the batch, with padding; or choose a rewrite that knows packed rows "
            "(linear attention, liger, lolcats, gam, hopfield)",
        )
    row, query = (int(x) for x in wrong.any(-1).nonzero()[0])
    line = mask[row, 0, query]
    if mask.dtype == torch.bool:
        shown = f"token {query} sees the keys {_listed(line)}"
    else:
        odd = line[(line != 0) & ~(line < HIDDEN)]
        sees = f"token {query} sees the keys {_listed(line == 0)}"
        shown = f"token {query} has scores raised by {odd[0]:.4g}" if len(odd) else sees
    return MaskFormError(
        "an attention mask has another form than the one that the rewrite was made for",
        found=f"{shown}, in row {row} of the mask",
        expected=f"{form}, of its own sequence and without padding",
        do="pass a mask of that form (a 2-D attention_mask says padding, position_ids that restart say packed rows); "
        "to keep softmax attention, transform without these layers (keep=, or sites= of the recipe)",
    )


def _listed(row: Tensor) -> str:
    at = row.nonzero().flatten().tolist()
    return ", ".join(map(str, at[:8])) + (", ..." if len(at) > 8 else "") if at else "none"


def _fake(mask: Tensor, causal: bool, window: int, biased: bool, packed: bool) -> Tensor:
    return mask.new_empty((mask.size(0), mask.size(-1)), dtype=torch.int64)


def _vmapped(info: Any, axes: tuple[int | None, ...], mask: Tensor, *form: Any) -> tuple[Tensor, int]:
    """The samples of a batch are rows of a larger one."""
    assert axes[0] is not None
    mask = mask.movedim(axes[0], 0)
    found = torch.ops.gatecc.sequences(mask.flatten(0, 1), *form)
    return found.unflatten(0, mask.shape[:2]), 0


_LIBRARY.impl("sequences", _kernel, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::sequences", _fake, lib=_LIBRARY)
torch.library.register_vmap("gatecc::sequences", _vmapped, lib=_LIBRARY)
