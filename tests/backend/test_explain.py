"""explain: graphs, breaks, what was lowered and what not; the model is as before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gatecc
from gatecc.errors import ArgumentError, ExampleInputsError, UnsupportedModelError
from gatecc.passes.lower import LOWERINGS, Lowering, Outcome
from gatecc.report import Report


class Broken(nn.Module):
    """A model of transformers, then a branch on a value, then a head, with statistics and dropout."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        self.language = LlamaForCausalLM(config)
        self.norm, self.head = nn.BatchNorm1d(29), nn.Sequential(nn.Dropout(0.5), nn.Linear(29, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.norm(self.language(ids, use_cache=False).logits.flatten(0, 1))
        if logits.sum() > 1e9:
            logits = logits * 2
        return self.head(logits)


@pytest.fixture(scope="module")
def broken() -> tuple[Broken, dict[str, torch.Tensor], bool, Report]:
    torch.manual_seed(0)
    model, ids = Broken(), torch.randint(0, 29, (2, 5))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    report = gatecc.explain(model, (ids,))
    return model, before, torch.equal(torch.get_rng_state(), state), report


def test_graphs_and_breaks(broken: Any) -> None:
    report = broken[-1]
    assert report.compiled == "training"
    assert [pair.scopes for pair in report.graphs] == [("graph 1",), ("graph 2",)]
    assert report.graphs[0].after is not None
    assert report.graphs[1].after is None
    (row,) = report.breaks
    line = Broken.forward.__code__.co_firstlineno + 2
    assert row.line == f"test_explain.py:{line}"
    assert "depends on the value" in row.reason
    assert "torch.where" in row.remedy


def test_what_was_lowered_and_what_it_saves(broken: Any) -> None:
    report = broken[-1]
    rows = [row for row in report.lowered if row.lowering == "causal-mask"]
    assert [row.owner for row in rows] == [f"language.model.layers.{i}.self_attn" for i in range(2)]
    assert all(row.became == "is_causal=True" and row.gain and row.line.startswith("sdpa") for row in rows)
    assert report.totals.bytes_after < report.totals.bytes_before
    assert report.totals.parameters_before == sum(p.numel() for p in broken[0].parameters())


def test_what_inductor_fuses_is_left_to_it_with_a_reason(broken: Any) -> None:
    rows = [row for row in broken[-1].lowered if row.lowering == "regions"]
    found = [row.found for row in rows]
    assert "a rotary embedding, 4 times" in found
    assert "a gated unit, 2 times" in found
    assert any("norm, with the sum before it" in text for text in found)
    assert all("Inductor's to fuse" in row.reason and not row.became for row in rows)


def test_nothing_is_changed(broken: Any) -> None:
    model, before, same_random_state, _ = broken
    assert model.training
    assert same_random_state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Causal(nn.Module):
    """Attention over x: (B, N, 8) whose mask is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def test_what_is_left_alone_has_a_reason() -> None:
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        report = gatecc.explain(Causal(), {"x": torch.randn(2, 5, 8), "mask": mask}, dynamic=True)
    assert report.compiled == "inference"
    (row,) = [row for row in report.lowered if row.lowering == "causal-mask"]
    assert not row.became
    assert row.reason
    assert report.graphs[0].after is None


def test_a_failing_lowering_and_a_graph_that_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(Lowering):
        def lower(self, program: Any, sites: Any, settings: Any) -> Iterator[Outcome]:
            raise ValueError("it cannot be")

    Failing.name = "failing"
    monkeypatch.setitem(LOWERINGS, "failing", Failing)
    (note,) = gatecc.explain(nn.Linear(8, 8), (torch.randn(2, 8),)).notes
    assert note == "graph 1: the lowering failing failed, ValueError: it cannot be"


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.ffn, x, use_reentrant=False)


def test_nested_graphs_are_said() -> None:
    (note,) = gatecc.explain(Checkpointed(), (torch.randn(2, 8),)).notes
    assert note.startswith("graph 1 goes on to Inductor as it is: it holds graphs of its own")


class Looping(nn.Module):
    def forward(self, x: torch.Tensor, choice: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for expert in range(2):
            rows = torch.where(choice == expert)[0]
            y.index_add_(0, rows, x[rows] * expert)
        return y


def test_a_break_in_a_loop_of_which_no_graph_comes() -> None:
    report = gatecc.explain(Looping(), (torch.randn(4, 8), torch.tensor([0, 1, 1, 0])))
    (row,) = report.breaks
    assert row.line == f"test_explain.py:{Looping.forward.__code__.co_firstlineno + 3}"
    assert row.reason.endswith("in a loop: the whole function runs uncompiled")
    assert row.remedy.endswith("`torch._dynamo.config.capture_dynamic_output_shape_ops = True`")
    assert report.notes == ["torch.compile made no graph of this call: a loop holds a break"]


def test_as_often_as_one_likes() -> None:
    """More often than Dynamo compiles anew, and a compiled model is the model behind it."""
    model: Any = torch.compile(nn.Linear(8, 8), backend="eager")
    x = torch.randn(2, 8)
    assert all(len(gatecc.explain(model, (x,)).graphs) == 1 for _ in range(12))


def test_errors() -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(ExampleInputsError, match="does not run"):
        gatecc.explain(model, (torch.randn(2, 7),))
    with pytest.raises(UnsupportedModelError):
        gatecc.explain(cast("Any", abs), (torch.randn(2, 8),))
    with pytest.raises(ArgumentError, match=r"gatecc\.frozen"):
        gatecc.explain(model, (torch.randn(2, 8),), options={"gatecc.frozen": True})
