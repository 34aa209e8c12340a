"""bias: what is added to the scores of attention, where it does not depend on what the model is given.

Relative positions and the masks of shifted windows come from weights and sizes alone: they are computed here. One that
repeats along the samples is held once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from gatecc.codegen.onnx.lower.write import UnwritableError, Writer, aten
from gatecc.ir.evaluate import Evaluator, Slice, UnprovableError
from gatecc.ir.ops import RESHAPES, SAME_SHAPE, opname
from gatecc.ir.program import fake
from gatecc.ir.site import Attention
from gatecc.ir.sizes import expression, node_shape, symbols

_LARGEST = 1e30  # from there on ONNX Runtime takes a number for minus infinity
_MOST = 1 << 25  # bytes
_SAMPLES = (1, 2, 3)


@dataclass(frozen=True, eq=False)
class Bias:
    """``values``: (1, heads or 1, N, M) for all rows of the batch, or (rows, ...) that repeat ``times`` along it."""

    values: Tensor
    times: Any = 1


def constant_bias(site: Attention, evaluator: Evaluator) -> Bias | None:
    """What is added to the scores of a site; None if it depends on inputs, or if the scores are no plain sum."""
    if site.spelling == "sdpa":
        given = None if site.core.args[5] else site.core.args[3]
    else:
        scores = site.find("scores")
        given = None if scores is None or site.soft_cap else scores.node
    shape = node_shape(given) if isinstance(given, fx.Node) else None
    if not isinstance(given, fx.Node) or shape is None or len(shape) != 4:
        return None
    held, free = fake(given), symbols(shape[0])
    if held is None or not held.is_floating_point() or len(free) > 1:
        return None
    if not all(isinstance(size, int) for size in shape[1:]):
        return None
    try:
        return _evaluated(given, free, evaluator)
    except UnprovableError:
        return None


def _evaluated(given: fx.Node, free: set[sympy.Symbol], evaluator: Evaluator) -> Bias | None:
    part = evaluator.slice(given)
    if part.inputs or not _is_sum(part):
        return None
    found = [evaluator.run(part, dict.fromkeys(free, n)) for n in (_SAMPLES if free else _SAMPLES[:1])]
    first = found[0]
    if not bool((first.abs() < _LARGEST).all()):
        return None
    if all(torch.equal(x, first[:1].expand_as(x)) for x in found):
        first = first[:1]
    elif any(not torch.equal(x, first.repeat(n, 1, 1, 1)) for n, x in zip(_SAMPLES, found, strict=False)):
        return None
    return None if first.nbytes > _MOST else Bias(first.contiguous(), next(iter(free), 1))


def _is_sum(part: Slice) -> bool:
    """Whether the products, which count as zeros here, are added to and nothing else."""
    held = set(part.content)
    for node in part.nodes:
        if node in held or held.isdisjoint(node.all_input_nodes) or not isinstance(node.meta.get("val"), Tensor):
            continue
        name = opname(node)
        scaled = name in ("mul", "div") and not isinstance(node.args[1], fx.Node)
        if not (scaled or name == "add" or name in RESHAPES | SAME_SHAPE):
            return False
        held.add(node)
    return True


def write_bias(writer: Writer, bias: Bias) -> fx.Node:
    """As a value with one row, or as many as the batch has."""
    held = writer.constant("attention_bias", bias.values)
    if bias.times == 1 or len(bias.values) == 1:
        return held
    samples = next(
        (s for n in writer.program.placeholders for s in n.meta["val"].shape if expression(s) == bias.times), None
    )
    if samples is None:
        raise UnwritableError(f"the size {bias.times} is that of no input")
    return writer.call(aten.repeat.default, held, [samples, 1, 1, 1])


__all__ = ["Bias", "constant_bias", "write_bias"]
