"""Padded weights: a convolution whose weight is padded in the graph (a causal one, say) gets the padded weight.

ONNX Runtime 1.31 takes any Pad before a Conv for one of its input, and loses its name when it fuses the two. torch.onnx
folds constants of up to some thousand elements; larger ones are folded here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import onnx_ir as ir

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def fold_padded_weights(graph: ir.Graph) -> None:
    """Put initializers in the place of every Pad of an initializer that a convolution reads as its weight."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type not in _CONVOLUTIONS or node.inputs[1] is None:
            continue
        pad = node.inputs[1].producer()
        weight = None if pad is None or pad.op_type != "Pad" else _padded(pad)
        if pad is None or weight is None:
            continue
        folded = ir.Value(name=f"{pad.outputs[0].name}_folded", const_value=ir.tensor(weight))
        folded.shape, folded.dtype = ir.Shape(weight.shape), ir.tensor(weight).dtype
        graph.initializers.add(folded)
        source = pad.inputs[0]
        pad.outputs[0].replace_all_uses_with(folded)
        graph.remove(pad, safe=True)
        name = None if source is None or source.uses() else source.name
        if name is not None and name in graph.initializers:
            del graph.initializers[name]


def _padded(pad: Any) -> torch.Tensor | None:
    """The weight with zeros around it; None if something of it is not known before the graph runs."""
    held = [None if v is None else v.const_value for v in pad.inputs]
    mode = pad.attributes.get("mode")
    if (mode is not None and mode.as_string() != "constant") or len(held) < 2 or held[0] is None or held[1] is None:
        return None
    if any(v is not None and c is None for v, c in zip(pad.inputs, held, strict=True)):
        return None
    weight = torch.from_numpy(held[0].numpy().copy())
    axes = [int(a) for a in held[3].numpy()] if len(held) > 3 and held[3] is not None else range(weight.dim())
    value = float(held[2].numpy()) if len(held) > 2 and held[2] is not None else 0.0
    ends = [int(p) for p in held[1].numpy()]
    amounts = [0] * (2 * weight.dim())  # torch counts from the last axis on
    for i, axis in enumerate(axes):
        place = 2 * (weight.dim() - 1 - axis % weight.dim())
        amounts[place], amounts[place + 1] = ends[i], ends[len(ends) // 2 + i]
    return torch.nn.functional.pad(weight, amounts, value=value)
