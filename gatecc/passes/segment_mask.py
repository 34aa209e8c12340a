"""SegmentMask: tokens of a condition see their own condition only; all others see everything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import Program, shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Attention, Site
from gatecc.ir.sizes import same
from gatecc.ops.in_segments import in_segments
from gatecc.passes.operands import condition, place, stage


@dataclass(frozen=True)
class SegmentMask(Rewrite):
    """Hide from the queries of segment s > 0 the keys of all other segments; those of segment 0 see every key.

    ``segment`` is an input of the model, an integer (B, N) for each token: 0 for the image, 1, 2, ... for conditions.
    What a condition's tokens compute then does not depend on the image, nor on other conditions. Keys that the model
    hides stay hidden. The site's value is that of ``Attention.heads``.
    """

    name = "segment_mask"

    segment: str = "segment"

    def contract(self) -> Contract:
        return changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True, same_for_layers=True, loses_cache=True)

    def reads(self) -> Iterable[str]:
        return ("heads", "q")

    def rewrite(self, site: Site, edit: Editor) -> None:
        scores = site.find("scores")
        found = condition(self.segment, edit.program, stage(site, "q"))
        if not isinstance(site, Attention) or site.cross or site.over != "tokens" or found.axes != "bn":
            raise _refusal(site, f"{self.segment} with the axes {found.axes}")
        if scores is not None and scores.axes == "bhnm":
            edit.replace(scores.node, edit.call(hidden_scores, scores.node, found.node, name="seen"))
            return
        core = site.core
        fused = torch.ops.aten.scaled_dot_product_attention.default
        if core.target is not fused or stage(site, "q").axes != "bhnd":
            raise _refusal(site, f"attention spelled as {core.target}")
        names = [argument.name for argument in fused._schema.arguments]
        given: dict[str, Any] = dict(zip(names, core.args, strict=False)) | dict(core.kwargs)
        options = [given.get(name, default) for name, default in _OPTIONS.items()]
        operands = [given[name] for name in ("query", "key", "value")]
        read = _inputs(edit.program, found.node, operands[1:])
        arguments = (*operands, found.node, given.get("attn_mask"), *options, *read)
        new = edit.call(attention_in_segments, *arguments, name="heads")
        edit.replace(core, new)
        edit.discard(core)


_OPTIONS = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def _refusal(site: Site, found: str) -> SiteRefusedError:
    return SiteRefusedError(
        "tokens of a condition can be hidden in self-attention over one sequence",
        where=place(site),
        found=found,
        expected="an integer (B, N) for each token, and attention with samples, heads and tokens as axes",
        do="leave this site out",
    )


def _inputs(program: Program, segment: fx.Node, values: Sequence[fx.Node]) -> tuple[str, str]:
    """The names of the model's inputs that values depend on: those with a row for each token, and the others."""
    seen, stack = set(values), list(values)
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                stack.append(node)
    tokens, others = list[str](), list[str]()
    for node, path in zip(program.placeholders, program.paths, strict=True):
        if node in seen:
            sizes = shape(node)
            alike = len(sizes) > 1 and all(map(same, sizes[:2], shape(segment)))
            (tokens if alike and len(path) == 1 else others).append(str(path[0]))
    return ",".join(tokens), ",".join(others)


def hidden_scores(scores: Tensor, segment: Tensor) -> Tensor:
    """scores: (B, H, N, N), -inf where a query does not see a key."""
    _, _, seen = in_segments(scores, scores, segment, False, "", "")
    return scores.masked_fill(~seen, float("-inf"))


def attention_in_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
    tokens: str,
    others: str,
) -> Tensor:
    """Attention with what the model hides and what segments hide. q: (B, H, N, D). ``tokens`` and ``others``: see
    `in_segments`."""
    k, v, seen = in_segments(k, v, segment, mask is None and not causal, tokens, others)
    if causal:
        seen = seen & torch.ones(q.size(-2), k.size(-2), dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen = mask.masked_fill(~seen, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, seen, dropout, scale=scale, enable_gqa=gqa)
