"""Rewrites done in Python: beside rewrites of graphs, undone with them, and refused without a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError, ExampleInputsError
from gatecc.ir.router import RouterSpec
from gatecc.recipes import ensembles


def test_one_recipe_may_rewrite_graphs_and_choose(tmp_path: Path) -> None:
    plain, (x,) = ensembles.classifiers()
    both = [
        gatecc.Gate(gatecc.Linear["members.large.down"].out, gatecc.GateSpec("in", granularity="channel")),
        gatecc.Choose(gatecc.Model, RouterSpec("features", "linear", "softmax_topk(1)")),
    ]
    model: Any = gatecc.transform(plain, both, (x,))
    report = gatecc.last_report(model)
    assert [row.rewrite for row in report.rewrites] == ["gate", "choose"]
    assert any("checked without the others" in note for note in report.notes)
    new = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    assert {name.rpartition(".")[0] for name in new} == {"members.large.down.gate", "router"}
    gatecc.save(model, tmp_path)
    assert torch.equal(gatecc.load(plain, tmp_path)(x), model(x))
    back = gatecc.revert(model)
    assert list(back.state_dict()) == list(plain.state_dict())
    assert torch.equal(back(x), plain(x))


def test_after_an_error_an_in_place_model_is_as_it_was() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.size(0) == 1:
                raise ValueError("not one sample")
            return x

    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    ensemble = gatecc.ensemble([Odd(), Odd()], (x,))
    rewrite = gatecc.Choose(gatecc.Model, RouterSpec("x", "none", "softmax_topk(1)"))
    with pytest.raises(ExampleInputsError, match="not one sample"):
        gatecc.transform(ensemble, rewrite, (x,), inplace=True)
    assert ensemble.chooser is None
    with pytest.raises(ArgumentError, match="more experts"):
        gatecc.transform(
            ensemble, gatecc.Choose(gatecc.Model, RouterSpec("x", "linear", "softmax_topk(3)")), (x,), inplace=True
        )
    assert ensemble.chooser is None
    assert torch.equal(ensemble(x), x)


def test_nothing_is_captured_and_costs_come_from_runs() -> None:
    plain, (x,) = ensembles.classifiers()
    report = gatecc.last_report(gatecc.transform(plain, gatecc.recipe("global-local", hidden=4, t=2.0), (x,)))
    large, gate = 2 * 6 * (8 * 32 + 32 * 5), 2 * 6 * (8 * 4 + 4 * 2)
    assert report.graphs == []
    assert report.totals.flops_after == large + gate
    assert report.totals.flops_before == large + 2 * 6 * 8 * 5
    assert report.totals.contract == "changes_function"
    assert gatecc.inspect(plain, (x,)).totals.flops_before == report.totals.flops_before
