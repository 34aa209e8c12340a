"""Leaving per token: a token that is sure of itself at a block goes no deeper, and others still see it in every layer.

The rule is state propagation (Elbayad et al., Depth-Adaptive Transformer, 2020; CALM, 2022): the hidden state of a
token that left stays what it was at its exit, and each later layer makes its keys and values of that. It is the one
rule that is a function of the token's own past, whoever is decoded beside it and in whatever pieces a text comes, so
that a prefill, single steps and the full forward agree; it has no parameters; and it costs a layer its keys and values.
(Keys copied from the last layer that ran would be of another layer's space. Computing a skipped layer once a later
token needs it would give back what leaving saved.)

In the graph it is a mask: behind each block where(goes on, what the block yields, what it was given).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.program import META, origin
from gatecc.ir.site import Attention, Block, Site, Value
from gatecc.ir.skipped import mark, sees_all, skipped_at
from gatecc.passes.exit.head import ExitHead, as_logits, goes_on
from gatecc.passes.operands import place, stage


def leave_per_token(
    site: Site, logits: Value, head: ExitHead, rule: Callable[[int], nn.Module], label: str, edit: Editor
) -> None:
    """Let tokens leave at a block: logits (b, n, c). ``rule`` makes the module of the rule for so many classes.

    Of several exits the first comes first. What a token does not need is marked as skipped (gatecc.ir.skipped). Raises
    SiteRefusedError.
    """
    here, chosen = stage(site, "out").node, logits.node
    _check(site, head, edit)
    before = _choice(chosen)
    if before is not None and _choice(here) is None:
        raise _refused(site, "there is an exit at it, or behind it, already", "exits from the first block to the last")
    final = chosen if before is None else before[1]
    blocks = _behind(site, here, final, edit)
    built = head.build(site, replace(logits, node=final), edit)
    early = as_logits(built.logits, final, edit)
    if before is not None:
        early = _put(before[0], early, before[2], "exit_logits", site, edit)
    stays = edit.call(edit.module(label, lambda: rule(int(final.meta["val"].shape[-1]))), early, name=label)
    if before is not None:
        stays = edit.call(torch.logical_and, before[0], stays, name="goes_on")
    stream = here
    for block in blocks:
        old = stage(block, "out").node
        frozen = _choice(old)
        stream = _put(stays, old if frozen is None else frozen[1], stream, "stream", site, edit, old)
    _put(stays, final, early, "left_or_not", site, edit, chosen)


def _put(
    stays: fx.Node, value: fx.Node, other: fx.Node, name: str, site: Site, edit: Editor, old: fx.Node | None = None
) -> fx.Node:
    """where(stays, value, other), of which the value is needed by those who stay, in the place of ``old``."""
    made = edit.call(goes_on, stays, value, other, name=name)
    made.meta[META] = replace(origin(made), owner=site.owner)
    if old is not None:
        edit.replace(old, made)
        if old is not value:
            edit.discard(old)
    found = skipped_at(edit.program, made)
    if not isinstance(found, str):
        mark(made)
    elif not any(sees_all(node) for node in edit.program.calls()):  # in training some layers see all samples
        raise _refused(site, found, "blocks that compute the samples of a batch by themselves")
    return made


def _choice(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(who goes on, value, other) of what an exit chose; None for anything else."""
    if origin(node).inserted_by != "exit" or node.target is not torch.ops.aten.where.self:
        return None
    stays, value, other = node.args
    assert isinstance(stays, fx.Node)
    assert isinstance(value, fx.Node)
    assert isinstance(other, fx.Node)
    return stays, value, other


def _check(site: Site, head: ExitHead, edit: Editor) -> None:
    attentions = [s for s in edit.sites if isinstance(s, Attention) and not s.cross]
    seeing = next((s for s in attentions if not s.mask.causal), None)
    if seeing is not None:
        raise _refused(
            site,
            f"the mask of {seeing.key} is {seeing.mask.kind}",
            "a model in which no token sees a later one",
            "where tokens see later ones, samples may leave: a model whose logits are (b, c)",
        )
    if head.pools_tokens:
        raise _refused(site, str(head), "a head of each token by itself", "take head='tail' or 'pooled(pool=each)'")


def _behind(site: Site, here: fx.Node, final: fx.Node, edit: Editor) -> list[Block]:
    """The blocks that the stream goes through from ``here`` on. Raises SiteRefusedError if more is between them."""
    all_blocks = [s for s in edit.sites if isinstance(s, Block) and {"in", "out"} <= s.values.keys()]
    later = [s for s in all_blocks if here < s.values["out"].node < final]
    found: list[Block] = []
    stream = here
    while True:
        onward = [s for s in later if s.values["in"].node is stream]
        if not onward:
            break
        found.append(max(onward, key=lambda s: s.values["out"].node))
        stream = found[-1].values["out"].node
    inside = tuple(f"{s.owner}." for s in found)
    left = next((s for s in later if s not in found and not s.owner.startswith(inside)), None)
    if left is not None:
        raise _refused(
            site,
            f"{left.key} reads {left.values['in'].node.name}, which is no block's result",
            "blocks that follow one another, so that a token that left can stay as it is",
            "leave the exits before that block out",
        )
    return found


def _refused(site: Site, found: str, expected: str, do: str = "leave this site out") -> SiteRefusedError:
    return SiteRefusedError("tokens cannot leave here", where=place(site), found=found, expected=expected, do=do)
