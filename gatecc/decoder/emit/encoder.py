"""write_encoder: what does not change while a text is decoded, as a function of tensors alone, which a file can hold.

Its inputs are those of the model that are no tokens; its outputs what the steps read of them: of an encoder, the keys
and values of every layer's cross-attention, and the mask of its padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._pytree import tree_structure

from gatecc.decoder.emit.numbers import Numbers
from gatecc.decoder.emit.positions import PositionWriter
from gatecc.decoder.emit.sized import Sizes, record_closed
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.emit.writer import GraphWriter
from gatecc.decoder.plan import Plan
from gatecc.errors import DecoderError
from gatecc.ir.program import Program
from gatecc.ir.sizes import described_shape, expression, node_shape


@dataclass(frozen=True, eq=False)
class Encoder:
    """``program``: its placeholders are those of ``inputs``, nodes of the captured program; its outputs are the values
    of ``results``, which are such nodes, too. Inputs that the steps read as they are are not among them."""

    plan: Plan
    program: Program
    inputs: list[fx.Node]
    results: list[fx.Node]


def write_encoder(plan: Plan) -> Encoder | None:
    """Write the program, None if nothing is to be computed. Raises DecoderError if no input tells how many samples
    there are."""
    results = [node for node in plan.context if node.op != "placeholder"]
    if not results:
        return None
    writer = GraphWriter(plan)
    sources = Sources(writer)
    sources.context = {node: sources.add(node.name, node) for node in plan.inputs.context}
    numbers = Numbers(writer, sources, _batch(plan, sources))
    positions = PositionWriter(sources, numbers, live=plan.dependence.positions)
    writer.graph.output(tuple(positions.whole(node) for node in results))
    writer.graph.eliminate_dead_code()
    spec = tree_structure(tuple(range(len(results))))
    captured = plan.program
    constants = dict(captured.constants)
    program = Program(captured.module, writer.module(), captured.fqn, [], spec, constants=constants)
    given = sources.context

    def like_captured(sizes: Sizes) -> list[tuple[fx.Node, torch.Tensor]]:
        return [(made, sizes.like(node.meta["val"], None, 0)) for node, made in given.items()]

    ones = [made for node, made in given.items() if node.name.endswith("mask")]
    record_closed(program, lambda symbol: like_captured(Sizes(plan.lengths, symbol)), ones)
    return Encoder(plan, program, list(given), results)


def _batch(plan: Plan, sources: Sources) -> fx.Node:
    """The number of samples, from the first input that has an axis of that size."""
    for node, made in sources.context.items():
        for axis, size in enumerate(node_shape(node) or ()):
            if expression(size) in plan.lengths.batch:
                return sources.writer.size(made, axis)
    raise DecoderError(
        "no input beside the tokens says how many samples there are",
        where=type(plan.program.module).__name__,
        found=", ".join(f"{n.name} ({described_shape(n)})" for n in plan.inputs.context),
        expected="an axis for the samples",
    )
