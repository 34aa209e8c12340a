"""Fused gates: the rows of a linear gate inside a projection of the model, so that one matrix product yields both.

The layout is that of the published gated-attention models: for each group of key and value heads, the query rows of the
group, then its gate rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateModule, GateSpec
from gatecc.ir.gates.init import Zero
from gatecc.ir.gates.scorer import NoScorer
from gatecc.ir.program import shape
from gatecc.ir.site import Attention, Site, Value, Weight
from gatecc.ir.sizes import expression
from gatecc.ir.widen import Rows, new_features, own_features
from gatecc.passes.operands import gate_shape, place


def scored_elsewhere(spec: GateSpec) -> GateSpec:
    """The same gate without parameters of its own: it reads its scores."""
    activation = spec.activation if spec.start is None else spec.start.activation
    return GateSpec(spec.source, NoScorer(), spec.granularity, activation, spec.estimator, Zero())


def fused_scores(spec: GateSpec, value: Value, hidden: Value, edit: Editor) -> Value:
    """Put the gate's rows into the projection ``spec.fuse_into``; returns the scores, with the axes of ``hidden``."""
    site = edit.site
    role = str(spec.fuse_into).removesuffix("_proj")
    linear = _reader(_weight(site, role), hidden, edit)
    groups = site.kv_heads if isinstance(site, Attention) and site.kv_heads else 1
    alone = replace(spec, fuse_into=None)
    at = gate_shape(alone, value, [hidden], edit)
    gate = alone.build(at)
    width, bias = int(expression(shape(linear)[-1])), linear.args[2] if len(linear.args) > 2 else None
    if width % groups or gate.width % groups:
        raise _refused(site, role, f"{width} features and {gate.width} gates in {groups} groups")
    if bias is None and bool(gate.get_parameter("bias").any() if "bias" in gate._parameters else False):
        raise _refused(site, role, "it has no bias, and this gate starts at 1 through its bias")
    rows = Rows(groups, width // groups, gate.width // groups)
    edit.widen(linear, rows, lambda: _parameter(alone, at, "weight"), lambda: _parameter(alone, at, "bias"))
    own = edit.call(own_features, linear, *rows[:3], name=role)
    scores = edit.call(new_features, linear, *rows[:3], name=f"{edit.rewrite}_scores")
    edit.replace(linear, own, set(linear.users) - {own, scores} - edit.inserted, same=True)
    return Value(scores, hidden.axes)


def _parameter(spec: GateSpec, at: object, name: str) -> Tensor:
    made: GateModule = spec.build(at)  # pyright: ignore[reportArgumentType]
    found = made._parameters.get(name)
    return torch.zeros(made.width) if found is None else found.detach()


def _weight(site: Site, role: str) -> Weight:
    weight = site.weights.get(role)
    if weight is None:
        raise _refused(site, role, f"the site has the weights {', '.join(site.weights)}")
    if weight.rows is not None or weight.orientation != "out_in":
        raise _refused(site, role, f"{weight.fqn} is shared with other roles, or stored transposed")
    return weight


def _reader(weight: Weight, hidden: Value, edit: Editor) -> fx.Node:
    found = edit.program.readers(weight.fqn)
    linear = found[0] if len(found) == 1 else None
    if linear is None or linear.target is not torch.ops.aten.linear.default:
        raise _refused(edit.site, weight.fqn, f"{len(found)} uses, {', '.join(str(n.target) for n in found)}")
    if linear.args[0] is not hidden.node:
        raise _refused(edit.site, weight.fqn, f"it reads {linear.args[0]}, the gate reads {hidden.node}")
    return linear


def _refused(site: Site, role: str, found: str) -> SiteRefusedError:
    return SiteRefusedError(
        f"the gate cannot be fused into {role}",
        where=place(site),
        found=found,
        expected="a projection with a matrix of its own that reads what the gate reads",
        do="leave fuse_into out: the gate then has a matrix of its own",
    )
