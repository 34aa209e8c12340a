"""What is wrong with an ensemble is found when it is made, and said by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, ExampleInputsError, SiteRefusedError
from gatecc.ir.router import RouterSpec
from tests.passes.ensemble.models import PIXELS, TEXT, bert, texts

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Takes a mask that it can do without, and a scale that it cannot."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor) -> Tensor:
        y = x * scale.unsqueeze(-1)
        return y if mask is None else y * mask


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return kwargs["x"] + 1


def test_inputs_go_by_name_by_place_and_by_mapping() -> None:
    inputs = {"x": X, "weight": torch.arange(3.0), "mask": torch.ones(3, 1)}
    members = {"two": Two(), "any": Anything(), "plain": nn.Identity()}
    mapping = {"two": {"scale": "weight"}, "any": {"x": "x"}, "plain": {"input": "x"}}
    ensemble = gatecc.ensemble(members, inputs, inputs=mapping)
    assert ensemble.calls["two"].arguments == (("x", "x"), ("mask", "mask"), ("scale", "weight"))
    expected = (X * torch.arange(3.0)[:, None] + (X + 1) + X) / 3
    assert torch.allclose(ensemble(X, weight=torch.arange(3.0)), expected)  # without the mask, which has a default
    mapping["two"]["mask"] = None  # pyright: ignore[reportArgumentType] - it is given nothing
    with pytest.raises(ArgumentError, match="nothing in the ensemble takes an input") as raised:
        gatecc.ensemble(members, inputs, inputs=mapping)
    assert raised.value.found == "mask"


def test_by_place() -> None:
    ensemble = gatecc.ensemble([nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 2))], (X,))
    assert ensemble.names == ("0", "1")
    assert torch.equal(ensemble(X), ensemble(input=X))
    with pytest.raises(ArgumentError, match="given an input twice"):
        ensemble(X, input=X)
    for args, kwargs in (((X, X), {}), ((), {"y": X})):
        with pytest.raises(ArgumentError, match="does not know this input"):
            ensemble(*args, **kwargs)


@pytest.mark.parametrize(
    ("members", "options", "error", "found"),
    [
        ({}, {}, "without members", ""),
        ([], {}, "without members", ""),
        ({"a": torch.sin}, {}, "no model", "builtin"),
        ({"a.b": nn.Identity()}, {}, "no word", "a.b"),
        ({"keys": nn.Identity()}, {}, "nn.ModuleDict has itself", "keys"),
        ({"input": nn.Identity()}, {}, "the same name", "input"),
        ({"a": Two()}, {}, "an argument that nobody gives", "scale"),
        ({"a": Anything()}, {}, "without arguments", "forward"),
        ({"a": nn.Identity()}, {"inputs": {"b": {}}}, "inputs names no member", "b"),
        ({"a": nn.Identity()}, {"inputs": {"a": {"y": "input"}}}, "no such parameter", "y"),
        ({"a": nn.Identity()}, {"inputs": {"a": {"input": "z"}}}, "nothing in the ensemble has this name", "z"),
        ({"a": nn.Identity()}, {"output": "logits"}, "no such part", "logits"),
        ({"a": nn.Identity()}, {"output": {"b": "logits"}}, "output names no member", "b"),
        ({"a": nn.Identity()}, {"project": {"b": nn.Identity()}}, "project names no member", "b"),
        ({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)}, {}, "outputs of members differ", "(3, 2) and float32 (3, 3)"),
        ({"a": nn.Linear(4, 2), "b": nn.GRU(4, 2)}, {"inputs": {"b": {"hx": None}}}, "differ in structure", "tuple"),
        (
            {"c": nn.Identity(), "a": nn.Identity(), "b": nn.Identity()},
            {"inputs": {"a": {"input": "b"}, "b": {"input": "a"}}},
            "circle",
            "->",
        ),
    ],
)
def test_what_is_wrong_is_named(members: Any, options: dict[str, Any], error: str, found: str) -> None:
    with pytest.raises(ArgumentError, match=error) as raised:
        gatecc.ensemble(members, (X,), **options)
    assert found in raised.value.found


def test_a_member_that_does_not_run_is_named() -> None:
    with pytest.raises(ExampleInputsError, match="bad: a model of the ensemble does not run"):
        gatecc.ensemble({"good": nn.Linear(4, 2), "bad": nn.Linear(5, 2)}, (X,))


def test_a_loss_of_the_whole_batch_has_no_row_per_sample() -> None:
    with pytest.raises(ArgumentError, match=r"does not have a row for each sample(?s:.*)output="):
        gatecc.ensemble({"one": bert()}, {**TEXT, "labels": torch.zeros(5, dtype=torch.int64)})


def test_making_one_leaves_modes_weights_and_random_numbers_alone() -> None:
    member = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in member.state_dict().items()}
    state = torch.get_rng_state()
    gatecc.ensemble({"a": member}, (X,))
    assert member.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in member.state_dict().items())


@pytest.mark.parametrize(
    ("source", "choice", "error"),
    [
        ("features", "softmax_topk(3)", "more experts"),
        ("other", "dense", "does not have"),
        ("input_ids", "dense", "cannot read indices"),
        ("prompt", "dense", "one row for each sample"),
    ],
)
def test_routers_that_do_not_fit(source: str, choice: str, error: str) -> None:
    rewrite = gatecc.Choose(gatecc.Model, RouterSpec(source, "linear", choice))
    with pytest.raises(ArgumentError, match=error):
        gatecc.transform(texts(), rewrite, TEXT)


def test_a_task_that_the_router_alone_reads() -> None:
    task = torch.tensor([1, 0, 1])
    members = {"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)}
    inputs = {name: {"input": "x"} for name in members} | {"task": {"input": "number"}}
    ensemble = gatecc.ensemble(members, {"x": X, "number": task}, inputs=inputs, features={"task": nn.Identity()})
    rewrite = gatecc.Choose(gatecc.Model, RouterSpec("cond(task)", "lookup(2)", "softmax_topk(1)"))
    model: Any = gatecc.transform(ensemble, rewrite, {"x": X, "number": task}, verify=False)
    with torch.no_grad():
        model.router.weight.copy_(torch.eye(2))
        expected = torch.stack([members["b"](X)[0], members["a"](X)[1], members["b"](X)[2]])
        assert torch.allclose(model(X, task), expected, atol=1e-6)


def test_an_ensemble_of_tokens_needs_a_feature() -> None:
    with pytest.raises(ArgumentError, match="nothing to read"):
        gatecc.transform(gatecc.ensemble({"a": bert()}, TEXT), "mm-drex", TEXT)


def test_only_ensembles_have_members_and_only_one_router() -> None:
    with pytest.raises(SiteRefusedError, match="this is none"):
        gatecc.transform(nn.Linear(4, 2), "mm-drex", (X,))
    ensemble = gatecc.ensemble([nn.Linear(4, 2), nn.Linear(4, 2)], (X,))
    model = gatecc.transform(ensemble, "mm-drex", (X,), verify=False)
    with pytest.raises(SiteRefusedError, match="has a router already"):
        gatecc.transform(model, "tryage", (X,))
    assert isinstance(gatecc.transform(gatecc.revert(model), "tryage", (X,)), gatecc.Ensemble)
    with pytest.raises(ArgumentError, match="chosen at the model itself"):
        gatecc.Choose("mlp[...]", RouterSpec("x"))
    with pytest.raises(ArgumentError, match="no costs"):
        gatecc.transform(ensemble, gatecc.Choose(gatecc.Model, RouterSpec("features"), size=1.0), (X,))


def test_an_input_with_other_rows_is_an_error_and_one_row_is_for_all() -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return x + shift

    ensemble = gatecc.ensemble([Shifted(), Shifted()], (X, torch.ones(1, 4)))
    model: Any = gatecc.transform(ensemble, gatecc.recipe("tabledart", reads="x"), (X, torch.ones(1, 4)), verify=False)
    with torch.no_grad():
        model.router.weight.normal_(std=5.0)
        assert 0 < int(model.logits(PIXELS[:, 0, :4, 0], torch.ones(1, 4)).argmax(-1).sum()) < 5
        assert torch.allclose(model(PIXELS[:, 0, :4, 0], torch.ones(1, 4)), PIXELS[:, 0, :4, 0] + 1)
        with pytest.raises(ArgumentError, match=r"shift(?s:.*)2 rows for 5 samples"):
            model(PIXELS[:, 0, :4, 0], torch.ones(2, 4))
