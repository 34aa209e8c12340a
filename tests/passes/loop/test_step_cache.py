"""step_cache: samples that changed run, the others keep their outputs (RADD)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    if family == "plain":
        return nn.Sequential(nn.Embedding(32, 8), nn.Linear(8, 32)).eval()
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=16)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=16)).eval()


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("family", ["plain", "bert", "llama"])
@torch.no_grad()
def test_only_changed_samples_run(family: str) -> None:
    model = model_of(family)
    options: dict[str, Any] = {} if family == "plain" else {"input_ids": None}
    if family == "llama":
        options["use_cache"] = False
    ids = torch.randint(0, 31, (4, 6), generator=torch.Generator().manual_seed(1))

    def call(x: Tensor) -> Tensor:
        return logits(model(**(options | {"input_ids": x})) if options else model(x))

    trace = [ids]  # a sampler that unmasks a token of some samples in each step
    for rows in ([], [1], [1, 3], [], [0, 1, 2, 3], [2]):
        ids = ids.clone()
        ids[rows, len(trace) % 6] = 31 - len(trace)
        trace.append(ids)
    expected = [call(x) for x in trace]
    with gatecc.step_cache(model) as steps:
        got = [call(x) for x in trace]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))
    assert torch.equal(got[1], got[0])
    assert torch.equal(got[2][[0, 2, 3]], got[1][[0, 2, 3]])  # bitwise, where a sample did not change
    assert (steps.calls, steps.computed, steps.given) == (7, 4 + 0 + 1 + 2 + 0 + 4 + 1, 28)
    assert steps.runs == 5 + 1  # calls with a change, and one more that looks whether samples mix
    assert "forward" not in vars(model)


def test_what_cannot_be_kept() -> None:
    model = model_of("plain")
    with pytest.raises(ArgumentError, match="training mode"), gatecc.step_cache(model.train()):
        pass

    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    class Loss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean()

    x = torch.randn(3, 2)
    with gatecc.step_cache(mixing := Mixing().eval()):
        mixing(x)
        with pytest.raises(ArgumentError, match="depends on the others"):
            mixing(torch.cat([x[:2], x[2:] + 1]))
    with gatecc.step_cache(loss := Loss().eval()), pytest.raises(ArgumentError, match="a row for each sample"):
        loss(x)


def test_other_shapes_and_shared_inputs_run_everything() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
            return x * by

    model, x = Scaled().eval(), torch.randn(3, 2)
    with gatecc.step_cache(model) as steps:
        assert torch.equal(model(x, by=2.0), x * 2)
        assert torch.equal(model(x, by=3.0), x * 3)
        assert torch.equal(model(x[:2], by=3.0), x[:2] * 3)
        assert model(x[:0], by=3.0).shape == (0, 2)
        y = model(x, 3.0)
        y.zero_()  # what a caller does to a result is not kept
        assert torch.equal(model(x, 3.0), x * 3)
    assert steps.computed == 3 + 3 + 2 + 0 + 3 + 0
