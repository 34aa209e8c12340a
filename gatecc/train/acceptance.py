"""Acceptance: training of the rule that ends a draft (SpecDec++)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.modes import in_eval
from gatecc.errors import ArgumentError
from gatecc.passes.exit.rule import Acceptance, AcceptanceRule, ExitRule


class Drafts(NamedTuple):
    """``logits`` (S, V) of a draft, and whether the best token of each is the target's (S,) of bool."""

    logits: Tensor
    accepted: Tensor


@torch.no_grad()
def drafts(target: nn.Module, draft: nn.Module, texts: Iterable[Tensor]) -> Drafts:
    """What a draft would say at every token of texts (B, N) each, and whether the target says it too."""
    found, agreed = list[Tensor](), list[Tensor]()
    with in_eval(target), in_eval(draft):
        for ids in texts:
            small, large = _logits(draft, ids), _logits(target, ids)
            if small.shape != large.shape:
                raise ArgumentError(
                    "draft and target have other tokens",
                    found=f"logits {tuple(small.shape)} and {tuple(large.shape)}",
                    expected="one vocabulary",
                )
            found.append(small.flatten(0, 1))
            agreed.append((small.argmax(-1) == large.argmax(-1)).flatten())
    if not found:
        raise ArgumentError("there is no text to draft", found="no batches", expected="batches of token ids (B, N)")
    return Drafts(torch.cat(found), torch.cat(agreed))


def fit_acceptance(
    data: Drafts,
    rule: Acceptance | str = "acceptance(threshold=0.7)",
    *,
    steps: int = 200,
    lr: float = 1e-2,
    reject: float = 6.0,
) -> AcceptanceRule:
    """A rule trained on drafts: cross entropy of acceptance, in which a rejected token counts ``reject`` times."""
    made = ExitRule.coerce(rule)
    if not isinstance(made, Acceptance) or steps < 1:
        raise ArgumentError(
            "no such rule is trained here", found=f"{rule}, steps={steps}", expected="acceptance(...), steps >= 1"
        )
    module: Any = made.module(data.logits.size(-1)).to(data.logits.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
    weight = torch.tensor([reject, 1.0], device=data.logits.device)
    for _ in range(steps):
        loss = F.cross_entropy(module.verdict(data.logits.float()), data.accepted.long(), weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return module.eval()


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return next(x for x in pytree.tree_leaves(dict(out) if isinstance(out, dict) else out) if x.dim() == 3)
