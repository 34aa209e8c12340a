"""lower: a Program through the lowerings of an ONNX target: that of a whole call, or that of a decoder's step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from gatecc.codegen.onnx.lower import Subject, Target, lower_graph
from gatecc.codegen.onnx.lower.run import FailedLoweringError
from gatecc.export.conditions import NAME as CONDITION
from gatecc.export.conditions import open_conditions
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import Program
from gatecc.passes.lower.experts import Experts
from gatecc.passes.lower.lowering import Settings
from gatecc.pipeline import prepare

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")


def lower(
    program: Program,
    without: Collection[str] = (),
    *,
    target: Target,
    opset: int,
    context: int | None = None,
    group_experts: bool = True,
) -> list[Outcome]:
    """Lower a program in place; what was put in its ONNX form, and what was not and why.

    ``context`` is the number of positions that tables (of rotary embeddings) are made for; None leaves what depends on
    it in the graph. ``group_experts``: experts that the model spells out become the operator, as under torch.compile:
    its form is the one with the fewest nodes. Afterwards `gatecc.capture.exported.exported_program` makes the program
    what torch.onnx takes.
    Lowerings of the names ``without`` do not run; raises FailedLoweringError for one that fails, and the program is
    then good for nothing.
    """
    outcomes: list[Outcome] = []
    if CONDITION not in without:
        try:
            outcomes += open_conditions(program)
        except Exception as e:
            raise FailedLoweringError(CONDITION, e) from e
    sites = prepare(program).sites
    if group_experts and Experts.name not in without:
        try:
            outcomes += Experts().lower(program, sites, Settings())
        except Exception as e:
            raise FailedLoweringError(Experts.name, e) from e
        if any(outcome.became for outcome in outcomes):
            program.graph.eliminate_dead_code()
            sites = prepare(program).sites
    return outcomes + lower_graph(Subject(program, sites, target, opset, context), without)


def context_of(model: nn.Module) -> int | None:
    """The largest length that a model's config says it is made for; None if it says none."""
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in _LENGTHS:
            length = getattr(part, name, None)
            if isinstance(length, int) and length > 0:
                return length
    return None
