"""Recomputing an attention from what its site says: q, k, v, scale, heads and mask must give the heads that the graph
has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gatecc.ir.program import Program, attribute
from gatecc.ir.site import Attention, Value


def ordered(value: Value, tensors: dict[fx.Node, Any], axes: str) -> Tensor:
    """A value with its axes in the order ``axes``, missing ones of size 1, windows and grouped heads merged."""
    tensor, have = tensors[value.node], value.axes.text
    assert tensor.ndim == len(have), (value.axes, tensor.shape)
    for first, second in ("bw", "hr"):
        if second in have:
            one, other = have.index(first), have.index(second)
            at = one if other > one else one - 1  # where the first of the two stands once the second follows it
            tensor = tensor.movedim(other, at + 1).flatten(at, at + 1)
            have = have.replace(second, "")
    have = have.replace("g", "b")
    missing = [a for a in axes if a not in have]
    tensor = tensor.reshape(*tensor.shape, *(1,) * len(missing))
    return tensor.permute([(have + "".join(missing)).index(a) for a in axes])


def recomputed(site: Attention, tensors: dict[fx.Node, Any]) -> Tensor | None:
    """The heads that the site's fields make, (b, h, n, d) or (b, h, d, n) between channels; None where they say that
    more is added (bias, a soft cap)."""
    known = site.mask.kind in ("bidirectional", "causal", "sliding_window")
    if not known or site.mask.padding or site.mask.bias or site.soft_cap or site.sinks or site.scale is None:
        return None
    queries, keys = ("bhdn", "bhcn") if site.over == "channels" else ("bhnd", "bhmd")
    q, k, v = (ordered(site.values[name], tensors, axes) for name, axes in (("q", queries), ("k", keys), ("v", keys)))
    if q.shape[0] == k.shape[0] and k.shape[1] > 1:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.double().mT * site.scale
    distance = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])
    if site.mask.causal:
        scores = scores.masked_fill(distance < 0, -torch.inf)
    if site.mask.window is not None:
        scores = scores.masked_fill(distance >= site.mask.window, -torch.inf)
    return scores.softmax(-1) @ v.double()


def check(site: Attention, tensors: dict[fx.Node, Any]) -> bool:
    """Assert that the site's fields make its heads; False if they cannot be recomputed alone."""
    expected = recomputed(site, tensors)
    if expected is None:
        return False
    heads = ordered(site.values["heads"], tensors, "bhdn" if site.over == "channels" else "bhnd").double()
    assert heads.shape == expected.shape, (site.key, heads.shape, expected.shape)
    torch.testing.assert_close(heads, expected, rtol=1e-4, atol=1e-4, msg=lambda m: f"{site.key}: {m}")
    return True


def projected(site: Attention, program: Program, tensors: dict[fx.Node, Any], role: str) -> Tensor | None:
    """What the weight of a role makes of the stream that it reads, features last; None without such a weight."""
    weight, stream = site.weights.get(role), "hidden" if role == "q" else "hidden_kv"
    source = site.values.get(stream) or site.values.get("hidden")
    if weight is None or source is None or weight.orientation == "conv":
        return None
    matrix = attribute(program.module, program.relative_name(weight.fqn)).detach()
    matrix = matrix.T if weight.orientation == "in_out" else matrix
    bias = attribute(program.module, program.relative_name(weight.bias)).detach() if weight.bias else None
    rows = slice(*weight.rows) if weight.rows else slice(None)
    return torch.nn.functional.linear(tensors[source.node], matrix[rows], None if bias is None else bias[rows])
