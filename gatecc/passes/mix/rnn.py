"""RNN: put a module in the place of an RNN, GRU or LSTM layer, its last hidden state included."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.dataflow import Flow
from gatecc.ir.edit import Editor
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.program import Program
from gatecc.ir.site import RNN
from gatecc.ir.sizes import example_sizes
from gatecc.passes.mix.mixers.base import Place
from gatecc.passes.operands import place as where
from gatecc.passes.operands import stage, static_sizes


def replace_rnn(site: RNN, label: str, module: Callable[[Place], nn.Module], edit: Editor) -> None:
    """A causal module (B, N, C) -> (B, N, H) in the place of the layer, whose weights go. Raises SiteRefusedError."""
    _check(site, edit.program)
    given, out = stage(site, "in"), stage(site, "out")
    hidden = static_sizes(out)["c"]
    found = Place(static_sizes(given)["c"], 1, 1, hidden, hidden, 1.0, causal=True, layers=site.layers)
    path = edit.module(label, lambda: module(found))
    second = given.axes == "nbc"
    x = edit.call(swapped, given.node, name="in") if second else given.node
    mixed = edit.call(path, x)
    edit.replace(out.node, edit.call(swapped, mixed, name="mixed") if second else mixed)
    if site.last[0] is not None:
        edit.replace(site.last[0], edit.call(last_token, mixed, name="last"))
        edit.discard(site.last[0])
    edit.discard(out.node)
    edit.lost |= set(site.parameters)


def swapped(x: Tensor) -> Tensor:
    """Between (B, N, C) and (N, B, C)."""
    return x.transpose(0, 1)


def last_token(x: Tensor) -> Tensor:
    """(B, N, H) -> (1, B, H), as recurrent layers give their last hidden state."""
    return x[:, -1].unsqueeze(0)


def _check(site: RNN, program: Program) -> None:
    cell = site.last[1]
    if site.bidirectional:
        raise _refused(site, "it runs in both directions", "one direction")
    if stage(site, "in").axes == "nc":
        raise _refused(site, "a sequence without a batch axis", "x: (B, N, C) or (N, B, C)")
    if not all(_zero(state, program) for state in site.states):
        raise _refused(site, "it starts from a state that is not zero", "no initial state")
    if cell is not None and cell.users:
        raise _refused(site, "the model reads its last cell state", "outputs and last hidden state alone")
    if site.layers > 1 and site.last[0] is not None and site.last[0].users:
        raise _refused(site, f"the model reads the last hidden states of {site.layers} layers", "outputs alone")


def _zero(state: fx.Node, program: Program) -> bool:
    evaluator = Evaluator(Flow(program))
    try:
        part = evaluator.slice(state)
        return not part.inputs and not bool(evaluator.run(part, example_sizes(program)).any())
    except UnprovableError:
        return False


def _refused(site: RNN, found: str, expected: str) -> SiteRefusedError:
    return SiteRefusedError(
        "what was cannot be read from a window here",
        where=where(site),
        found=f"{site.cell}: {found}",
        expected=expected,
        do="leave this site out",
    )
