"""Windows: what an attention adds to its scores, told apart: masks that hide keys, and biases that a model learned.

A mask may differ between windows, samples and heads, so that it has no name; a mixer can still keep it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.dataflow import Flow
from gatecc.ir.edit import Editor
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.match.attention.masking import summands
from gatecc.ir.match.attention.scores import find_scores
from gatecc.ir.match.mask.pattern import read
from gatecc.ir.ops import CASTS, DROPOUTS, opname
from gatecc.ir.printer import node_text
from gatecc.ir.program import Program
from gatecc.ir.site import Attention
from gatecc.ir.sizes import example_sizes
from gatecc.passes.operands import place

HIDDEN = 50.0  # a score that lies this far below the best of its row is hidden: exp(-50) is 2e-22
_PASSING = CASTS | DROPOUTS | frozenset("mul div view reshape _unsafe_view flatten unflatten contiguous clone".split())


def addends(site: Attention, program: Program) -> list[fx.Node] | None:
    """What is added to the scores between their product and the softmax; None if something else is done to them."""
    if site.spelling == "sdpa":
        return [part for mask in site.maskings for part in summands(mask.node)]
    scores = site.find("scores")
    found = None if scores is None else find_scores(scores.node, -1, Flow(program))
    if found is None or found.others or found.source.addend is not None or site.soft_cap is not None or site.sinks:
        return None
    inside = {found.source.node, *found.path}
    added: list[fx.Node] = []
    for node in found.path:
        if opname(node) == "add" and not node.kwargs:
            added += [part for n in node.all_input_nodes if n not in inside for part in summands(n)]
        elif opname(node) not in _PASSING:
            return None
    return added


def learned(addend: fx.Node, program: Program) -> set[str]:
    """The parameters, by name, that an addend is computed from."""
    return {str(program.path(n)) for n in _made_of(addend, Flow(program)) if program.is_parameter(n)}


def biases(site: Attention, program: Program) -> set[str]:
    """The parameters that an attention uses to bias its scores: they go when its softmax goes."""
    added = addends(site, program)
    if added is None:
        added = [mask.node for mask in site.maskings]
    return {name for addend in added for name in learned(addend, program)}


def passed_by(site: Attention, reads: Sequence[str], program: Program) -> set[str]:
    """The parameters of norms that lie behind the linear stages that a mixer reads."""
    found: set[str] = set()
    for name in reads:
        if name.endswith("_linear") and (later := site.find(f"{name[0]}_raw")) is not None:
            found |= learned(later.node, program) - learned(site.values[name].node, program)
    return found


def masks(site: Attention, program: Program) -> list[fx.Node]:
    """The addends that may hide keys. Raises SiteRefusedError if they cannot be told from learned biases."""
    added = addends(site, program)
    if added is None or site.scale is None:
        raise SiteRefusedError(
            "the mask of these scores cannot be told from what else is done to them",
            where=place(site),
            found="a learned scale" if site.scale is None else "other operators than sums between q·k and the softmax",
            expected="softmax(scale q·k + bias + mask)",
            do="leave this site out",
        )
    return [addend for addend in added if _may_hide(addend, site, program)]


def prove_regions(site: Attention, program: Program) -> None:
    """Prove that what is seen in two steps is seen in one. Raises SiteRefusedError.

    A mask that tells regions apart (shifted windows), causal masks and padding are so; a neighbourhood is not.
    """
    for mask in masks(site, program):
        shown = _visible(mask, program)
        if shown is None:
            raise _unproved(site, f"{mask.name} depends on the inputs of the model")
        steps = shown.double()
        if bool(((steps @ steps > 0) & ~shown).any()):
            raise _unproved(site, f"{mask.name} hides what two steps would see")


def seen(site: Attention, q: fx.Node, edit: Editor) -> fx.Node | None:
    """(B, 1 or H, N, N), True where the model lets a query see a key; None if nothing hides any. q: (B, H, N, D)."""
    found = masks(site, edit.program)
    return edit.call(together, q, *found, name="seen") if found else None


def together(q: Tensor, *masks: Tensor) -> Tensor:
    """q: (B, H, N, D); masks: boolean or additive, (.., N, N) with or without heads and batch, (B, W, H, N, N) if
    windows have an axis of their own -> (B, 1 or H, N, N)."""
    result: Tensor | None = None
    for mask in masks:
        shown = mask if mask.dtype == torch.bool else mask > mask.amax(-1, keepdim=True) - HIDDEN
        shown = _batched(shown, q.size(0))
        result = shown if result is None else result & shown
    assert result is not None
    return result


def _batched(shown: Tensor, batch: int) -> Tensor:
    """(1 or batch, 1 or H, N, N). The windows of one sample follow each other in the batch."""
    for_all = shown.dim() <= 4 or shown.size(0) == 1
    shown = shown.flatten(0, -4) if shown.dim() > 4 else shown[(None,) * (4 - shown.dim())]
    if shown.size(0) == 1:
        return shown
    at = torch.arange(batch, device=shown.device)
    return shown[at % shown.size(0) if for_all else at // (batch // shown.size(0))]


def _may_hide(addend: fx.Node, site: Attention, program: Program) -> bool:
    shown = _visible(addend, program)
    if not learned(addend, program):
        return shown is None or not bool(shown.all())
    if shown is None or not bool(shown.all()):
        raise SiteRefusedError(
            "a mask and a learned bias of the scores are one value",
            where=place(site),
            found=node_text(addend),
            expected="a sum of a mask and a bias",
            do="leave this site out",
        )
    return False


def _visible(addend: fx.Node, program: Program) -> Tensor | None:
    """What an addend leaves visible on the example inputs' sizes; None if it depends on an input."""
    evaluator = Evaluator(Flow(program))
    try:
        part = evaluator.slice(addend)
        return None if part.inputs or part.content else read(evaluator.run(part, example_sizes(program)))[0]
    except UnprovableError:
        return None


def _unproved(site: Attention, found: str) -> SiteRefusedError:
    return SiteRefusedError(
        "a mask that does not tell regions apart cannot be split into rows and columns",
        where=place(site),
        found=found,
        expected="a mask under which two visible steps make a visible one, as in shifted windows",
        do="use split=False, or leave this site out",
    )


def _made_of(node: fx.Node, flow: Flow) -> set[fx.Node]:
    """The nodes whose values, not their sizes alone, a node is computed from."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at in found:
            continue
        found.add(at)
        stack.extend((*flow.inputs[at], *flow.writers.get(flow.base[at], ())))
    return found


def grid(module: nn.Module, tokens: int | None, site: Attention) -> tuple[int, int]:
    """Height and width of a window: as the owner or a part of it says (``window_size``), else it is square.

    Raises SiteRefusedError.
    """
    sizes = [vars(m).get("window_size") for m in (module, *module.children())]
    said = next((s for s in sizes if s is not None), None)
    side = round((tokens or 0) ** 0.5)
    found = (side, side) if said is None else _pair(said)
    if tokens and found is not None and found[0] * found[1] == tokens:
        return found
    raise SiteRefusedError(
        "the tokens of this attention are no grid of places",
        where=place(site),
        found=f"{tokens or 'a varying number of'} tokens" + (f", window_size {said}" if said is not None else ""),
        expected="a fixed number: height times width of a window, or a square",
        do="leave this site out, or assert in the model which size it is made for",
    )


def _pair(value: object) -> tuple[int, int] | None:
    pair: Sequence[object] = (value, value) if isinstance(value, int) else cast("Sequence[object]", value)
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(p, int) for p in pair):
        return cast("tuple[int, int]", tuple(pair))
    return None
