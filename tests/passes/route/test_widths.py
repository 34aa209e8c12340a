"""Experts of different sizes behind one router: each slot is served by the stack that holds its expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gatecc.errors import ArgumentError
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.route import Route
from gatecc.passes.route.spec import ExpertsSpec
from gatecc.passes.route.widths import Widths
from tests.graphs import done
from tests.passes.route.test_modes import GATED


def test_each_token_gets_its_experts_whatever_their_sizes() -> None:
    torch.manual_seed(1)
    router = RouterSpec("in", "linear(bias=False)", "softmax_topk(2)", "random(std=3)")
    result = done(GATED, Route("mlp[...]", router, Widths((0.5, 1, 0.5, 2)), skip=True))
    mlp: Any = result.program.module.get_submodule("mlp")
    sizes = [stack.down_proj.shape for stack in mlp.experts.experts]
    assert sizes == [(2, 8, 8), (1, 8, 16), (1, 8, 32)]
    with torch.no_grad():
        for parameter in mlp.experts.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    x = result.values["x"].flatten(0, 1)
    weights, indices = torch.topk((x @ mlp.router.weight.T).softmax(-1), 2)
    places = {0: (0, 0), 1: (1, 0), 2: (0, 1), 3: (2, 0)}
    assert set(indices.flatten().tolist()) == {*places, 4}
    y = torch.zeros_like(x)
    for t, xt in enumerate(x):
        for w, e in zip(weights[t] / weights[t].sum(), indices[t].tolist(), strict=True):
            if e == 4:  # nothing
                continue
            stack, i = mlp.experts.experts[places[e][0]], places[e][1]
            gate, up = F.linear(xt, stack.gate_up_proj[i], stack.gate_up_proj_bias[i]).chunk(2)
            y[t] += w * F.linear(F.silu(gate) * up, stack.down_proj[i], stack.down_proj_bias[i])
    assert torch.allclose(result.run()[0].flatten(0, 1), x + y, atol=1e-5)


def test_a_smaller_expert_has_the_strongest_neurons() -> None:
    result = done(GATED, Route("mlp[...]", RouterSpec(choice="softmax_topk(1)"), Widths((0.25, 1))))
    small, whole = (stack.down_proj[0] for stack in result.program.module.get_submodule("mlp.experts").experts)  # pyright: ignore[reportGeneralTypeIssues] - a module of ours
    assert small.shape == (8, 4)
    columns = [next(i for i in range(16) if torch.equal(whole[:, i], column)) for column in small.T]
    assert columns == sorted(set(columns))


def test_it_is_text_and_refused_where_one_size_is_needed() -> None:
    spec = ExpertsSpec.parse("widths((0.5, 1, 2))")
    assert spec == Widths((0.5, 1.0, 2.0)) == ExpertsSpec.from_json(spec.to_json())
    with pytest.raises(ArgumentError, match="shares"):
        Widths(())
    with pytest.raises(ArgumentError, match=r"copies\(\.\.\.\) or drop"):
        Route("mlp[...]", RouterSpec(choice="per_group(2)"), Widths((1, 2)), combine="slots")
