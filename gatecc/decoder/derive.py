"""derive: from a model to its checked decoder."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from gatecc.capture.adapters import adapted
from gatecc.capture.shield import shielded
from gatecc.capture.signature import rebuild, split_inputs
from gatecc.decoder.analysis.inputs import enlarged
from gatecc.decoder.plan import Plan, plan
from gatecc.decoder.runtime.decoder import Decoder
from gatecc.engine.analyse import Inputs, check_model, evaluation
from gatecc.engine.whole import whole_program
from gatecc.errors import ArgumentError, DecoderError

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}  # of a logit, relative to the largest; others: a percent


@shielded
def decoder(model: nn.Module, example_inputs: Inputs, *, capacity: int | None = None) -> Decoder:
    """Derive the decode step of a causal model from its full-sequence graph.

    ``example_inputs`` as everywhere: what the model is called with, token ids (B, N) among it. An ``attention_mask``
    (and ``position_ids``) among them makes a decoder for prompts that are padded on the left. ``capacity`` fixes the
    number of positions that states have room for; without it they grow.

    The decoder is compared with the model before it is returned: a prefill, single steps and a chunk against one full
    forward. It reads the model's own parameters, in eval mode.

    Raises DecoderError if a node stands in the way (it is named), if a mask does not prove causal, or if the comparison
    fails; ExampleInputsError, UnsupportedModelError and CaptureError as transform does.
    """
    if capacity is not None and capacity < 1:
        raise ArgumentError("capacity is out of range", found=str(capacity), expected="1 or more")
    args, kwargs = enlarged(*split_inputs(example_inputs))
    check_model(model)
    with evaluation(model):
        planned = plan(whole_program(model, args, kwargs))
        made = Decoder(planned, capacity)
        check(made, model, args, kwargs)
    return made


def check(made: Decoder, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Compare steps with the full forward on example inputs; the largest difference relative to max(1, max|logit|)."""
    example = dict(zip(made.plan.program.placeholders, made.plan.program.example, strict=True))
    inputs = made.plan.inputs
    if inputs.carried:  # the full forward reads what the steps left for one another
        example |= _left(made, example)
        args, kwargs = rebuild((args, kwargs), iter([example[n] for n in made.plan.program.placeholders]))
    with torch.no_grad(), adapted(model):
        expected = _logits(made.plan, model(*args, **kwargs))
    worst = 0.0
    for rows in (slice(None), slice(0, 1)):
        ids = example[inputs.tokens][rows]
        values = {n.name: example[n][rows] for n in inputs.history}
        context = {n.name: example[n][rows] for n in inputs.context}
        try:
            got = _stepped(made, ids, values, context)
        except (RuntimeError, IndexError, TypeError) as e:
            raise DecoderError(
                "the derived step does not run on the example inputs",
                where=type(model).__name__,
                found=f"{type(e).__name__}: {str(e).strip().splitlines()[0]}",
                do="please report it, with the model",
            ) from e
        worst = max(worst, _difference(expected[rows], got, values.get("attention_mask")))
    allowed = _TOLERANCE.get(expected.dtype, 1e-2)
    if not worst <= allowed:
        raise DecoderError(
            "the derived decoder does not compute what the model does",
            where=type(model).__name__,
            found=f"logits that differ by {worst:.2g}",
            expected=f"at most {allowed:.0e}, relative to the largest",
            do="the model is not causal, or an operator mixes positions unseen; please report it",
        )
    return worst


def _stepped(made: Decoder, ids: torch.Tensor, values: dict[str, Any], context: dict[str, Any]) -> torch.Tensor:
    """All logits, from a prefill of about half, two single tokens, and the rest as a chunk."""
    state = made.init_state(ids.shape[0], capacity=ids.shape[1], context=context)
    parts: list[torch.Tensor] = []
    for start, end in _pieces(ids.shape[1]):
        given = {name: x[:, start:end] for name, x in values.items()}
        logits, state = made.prefill(ids[:, start:end], state, **given)
        parts.append(logits)
    return torch.cat(parts, 1)


def _pieces(length: int) -> list[tuple[int, int]]:
    half = max(1, length // 2)
    return list(pairwise([0, half, *range(half + 1, min(half + 3, length)), length]))


def _left(made: Decoder, example: dict[fx.Node, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
    """What each token of the example reads of the step before it, by the inputs that hold it."""
    inputs = made.plan.inputs
    ids, parts = example[inputs.tokens], list[list[torch.Tensor]]()
    state = made.init_state(ids.shape[0], context={n.name: example[n] for n in inputs.context})
    for start, end in _pieces(ids.shape[1]):
        parts.append(made.thoughts(ids[:, start:end], state))
        given = {n.name: example[n][:, start:end] for n in inputs.history}
        _, state = made.prefill(ids[:, start:end], state, **given)
    return {node: torch.cat([part[i] for part in parts], 1) for i, node in enumerate(inputs.carried)}


def _logits(planned: Plan, output: Any) -> torch.Tensor:
    """The output that the decoder computes, of a call of the model."""
    leaves = tree_leaves(output)
    return leaves[planned.output]


def _difference(expected: torch.Tensor, got: torch.Tensor, mask: torch.Tensor | None) -> float:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if mask is not None:  # what a model computes at padding is of no use, and differs
        seen = mask.bool()
        expected, got = expected[seen], got[seen]
    scale = max(1.0, float(expected.abs().max()))
    return float((expected - got).abs().max()) / scale
