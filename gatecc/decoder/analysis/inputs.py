"""Inputs: what each input of a captured model is to its decoder: tokens, a value per token, or context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from gatecc.capture import signature
from gatecc.capture.signature import TOKENS
from gatecc.decoder.analysis.axes import Lengths
from gatecc.errors import DecoderError, ExampleInputsError
from gatecc.ir.program import Program
from gatecc.ir.sizes import described_shape, expression, node_shape, symbols, upper_bound

CARRIED = torch.ops.gatecc.carried.default
_LEAST = 8  # positions that an example has at least, so that a prefill, single steps and a chunk can be checked on it


@dataclass(frozen=True)
class Inputs:
    """``tokens`` grow step by step; ``history`` are the other inputs with a value per token (an attention mask), of
    which the state keeps all values so far; ``context`` does not change while a text is decoded (an encoder's input).
    ``carried`` (B, N, C) is what the step before left, as `gatecc::carried` reads it.
    """

    tokens: fx.Node
    history: list[fx.Node]
    context: list[fx.Node]
    lengths: Lengths
    carried: list[fx.Node]


def read_inputs(program: Program) -> Inputs:
    """The roles of a program's placeholders. Raises DecoderError if the length is fixed in the capture."""
    nodes = {str(path[0]): node for path, node in zip(program.paths, program.placeholders, strict=True)}
    tokens = next((nodes[name] for name in TOKENS if name in nodes), program.placeholders[0])
    sizes = list(node_shape(tokens) or ())
    length = expression(sizes[1]) if len(sizes) > 1 else None
    if not isinstance(length, sympy.Symbol):
        raise DecoderError(
            "the graph holds for one length only",
            where=tokens.name,
            found=f"the model fixes the size of {tokens.name} to {tuple(sizes)} while it is captured",
            expected="(batch, length) with a length that may vary",
            do="write the model without Python loops and branches over the length",
        )
    carried = [n for n in program.placeholders if any(user.target is CARRIED for user in n.users)]
    others = [n for n in program.placeholders if n is not tokens and n not in carried]
    history = [n for n in others if _is_history(n, length)]
    batch = {s for n in (tokens, *history, *carried) for s in symbols((node_shape(n) or (1,))[0])} - {length}
    context = [n for n in others if n not in history]
    batch |= _samples(program, tokens, context, batch)
    other = {s for n in context for size in node_shape(n) or () for s in symbols(size)} - batch - {length}
    lengths = Lengths(frozenset({length}), frozenset(batch), upper_bound(sizes[1]), frozenset(other))
    return Inputs(tokens, history, context, lengths, carried)


def _samples(program: Program, tokens: fx.Node, context: list[fx.Node], batch: set[sympy.Symbol]) -> set[sympy.Symbol]:
    """The symbols that are the batch as well, though nothing compared the two: of a mask whose rows are looked up, say.

    It is the first axis, if it is as long as the batch in the example and no other axis is the batch.
    """
    example = dict(zip(program.placeholders, program.example, strict=True))
    firsts = {
        node: sizes[0]
        for node in context
        if (sizes := [expression(size) for size in node_shape(node) or ()])
        and not any(size in batch for size in sizes)
        and example[node].shape[0] == example[tokens].shape[0]
    }
    return {size for size in firsts.values() if isinstance(size, sympy.Symbol)}


def _is_history(node: fx.Node, length: sympy.Symbol) -> bool:
    shape = node_shape(node) or ()
    if not any(length in symbols(size) for size in shape):
        return False
    if len(shape) == 2 and expression(shape[1]) == length:
        return True
    raise DecoderError(
        "an input depends on the length and is no value per token",
        where=node.name,
        found=f"its shape is ({described_shape(node)})",
        expected="(batch, length)",
        do="derive the decoder from example inputs without it",
    )


def enlarged(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with two samples at least and a few positions: a capture fixes sizes of one.

    Samples and positions are repeated. Raises ExampleInputsError if there is no tensor of tokens.
    """
    try:
        _, leaves = signature.flatten(args, kwargs)
    except signature.OpaqueArgumentError as e:
        raise ExampleInputsError("the example inputs hold something that a graph cannot take", found=str(e)) from e
    first = next((x for x in (*(kwargs.get(name) for name in TOKENS), *leaves) if isinstance(x, torch.Tensor)), None)
    if first is None or not 2 <= first.dim() <= 3 or 0 in first.shape:  # images have no positions to go on from
        raise ExampleInputsError(
            "the example inputs hold no tokens",
            found="no tensor" if first is None else f"a first tensor of shape {tuple(first.shape)}",
            expected="token ids of shape (batch, length)",
            do="a decode step is derived of models that predict tokens from the ones before them; others have none",
        )
    batch, length = first.shape[:2]

    def grown(x: torch.Tensor) -> torch.Tensor:
        if x.dim() >= 2 and x.shape[:2] == (batch, length) and length < _LEAST:
            x = x.repeat(1, -(-_LEAST // length), *[1] * (x.dim() - 2))[:, :_LEAST]
        if batch == 1 and x.dim() and x.shape[0] == 1:
            x = torch.cat([x, x])
        return x

    return signature.map_tensors(grown, (args, kwargs))


def continued(node: fx.Node, x: torch.Tensor, length: int) -> torch.Tensor:
    """What an input with a value per token is in a text of this length without padding: its own values repeated, but
    ones in a mask, and positions that go on. x: (B, N) -> (B, length)"""
    if node.name.endswith("attention_mask"):
        return x.new_ones(len(x), length)
    at = torch.arange(length, device=x.device)
    return at.to(x.dtype).expand(len(x), -1) if node.name == "position_ids" else x.index_select(1, at % x.shape[1])
