"""Choice: the softmax family against transformers' routers, and what holds for every way to choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates import choices as choices  # all of them, by name
from gatecc.ir.gates.choice import Choice, largest

ALL = [
    "softmax_topk(2)",
    "softmax_topk(2, renorm=False)",
    "softmax_topk(1, straight=True)",
    "softmax_topk(2, T=0.5, pre_activation=tanh)",
    "softmax_topk(2, learned=True)",
    "softmax_topk(2, T=cosine(2.0, 0.5, 10))",
    "sigmoid_topk(2, groups=2, limit=1, scale=2.5)",
    "sigmoid_topk(2, renorm=False, bias=True)",
    "noisy_topk(2)",
    "noisy_topk(2, learned=False)",
    "expert_choice",
    "expert_choice(capacity=2.0)",
    "expert_choice(capacity=linear(8.0, 2.0, 10))",
    "threshold(t=0.2)",
    "threshold(t=0.4, score=sigmoid, renorm=False)",
    "dense",
    "dense(score=sigmoid, splits=2)",
    "dense_to_sparse(k=2)",
    "sinkhorn_topk(k=2, p=0.5)",
    "per_group(2)",
    "per_group(2, k=2)",
]
EXPERTS = 8


def choose(text: str, logits: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
    choice = Choice.parse(text)
    experts = logits.size(-1)
    if choice.scores(experts) != experts:
        logits = torch.cat([logits, torch.randn_like(logits)], -1)
    named = {**choice.parameters(experts), **choice.buffers(experts)}
    return choice(logits, named, training)


def router(module: str, name: str, weight: Tensor, **config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, weights and indices of a router of transformers for hidden states that are its logits."""
    import importlib
    from types import SimpleNamespace

    cls = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    made = cls(SimpleNamespace(hidden_size=weight.size(1), num_local_experts=weight.size(0), **config))
    made.weight.data = weight
    return made


@pytest.mark.parametrize(
    ("module", "name", "config", "text"),
    [
        ("mixtral", "MixtralTopKRouter", {"num_experts_per_tok": 2}, "softmax_topk(2)"),
        ("granitemoe", "GraniteMoeTopKRouter", {"num_experts_per_tok": 3}, "softmax_topk(3)"),
        (
            "qwen2_moe",
            "Qwen2MoeTopKRouter",
            {"num_experts_per_tok": 4, "num_experts": 8, "norm_topk_prob": False},
            "softmax_topk(4, renorm=False)",
        ),
        (
            "qwen2_moe",
            "Qwen2MoeTopKRouter",
            {"num_experts_per_tok": 4, "num_experts": 8, "norm_topk_prob": True},
            "softmax_topk(4)",
        ),
        *[
            (
                "deepseek_v3",
                "DeepseekV3TopkRouter",
                {
                    "num_experts_per_tok": 3,
                    "routed_scaling_factor": 2.5,
                    "n_group": groups,
                    "topk_group": limit,
                    "norm_topk_prob": renorm,
                },
                f"sigmoid_topk(3, groups={groups}, limit={limit}, scale=2.5, renorm={renorm}, bias=True)",
            )
            for groups, limit, renorm in ((4, 2, True), (1, 1, True), (2, 1, False))
        ],
    ],
)
def test_chooses_as_transformers_does(module: str, name: str, config: dict[str, Any], text: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(50, 16), torch.randn(8, 16), torch.randn(8) * 0.3
    theirs: Any = router(module, name, weight, **config)
    if hasattr(theirs, "e_score_correction_bias"):
        theirs.e_score_correction_bias.copy_(bias)
    _, wanted, at = theirs(x)
    weights, indices = Choice.parse(text)(x @ weight.T, {"expert_bias": bias} if "bias" in text else {}, False)
    dense, expected = torch.zeros(50, 8), torch.zeros(50, 8)
    torch.testing.assert_close(dense.scatter(1, indices, weights), expected.scatter(1, at, wanted))


def test_switch_is_top_1_without_renormalisation() -> None:
    z = torch.randn(20, 5)
    weights, indices = choose("softmax_topk(1, renorm=False)", z)
    p = torch.softmax(z, -1).max(-1)
    torch.testing.assert_close(weights[:, 0], p.values)
    assert torch.equal(indices[:, 0], p.indices)


@pytest.mark.parametrize("text", ALL)
def test_text_and_json(text: str) -> None:
    choice = Choice.parse(text)
    assert choice == Choice.parse(str(choice)) == Choice.from_json(choice.to_json())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("text", ALL)
@given(tokens=st.integers(0, 5), ties=st.booleans())
def test_every_choice(text: str, training: bool, tokens: int, ties: bool) -> None:
    torch.manual_seed(tokens)
    z = torch.zeros(tokens, EXPERTS) if ties else torch.randn(tokens, EXPERTS) * 3
    weights, indices = choose(text, z, training)
    choice = Choice.parse(text)
    assert weights.dtype == torch.float32
    assert indices.dtype == torch.int64
    assert weights.shape == indices.shape
    assert weights.size(0) == tokens
    assert weights.size(1) <= choice.slots(EXPERTS)
    assert ((indices >= 0) & (indices <= EXPERTS)).all()
    assert (weights >= 0).all()
    twice = torch.zeros(tokens, EXPERTS + 1).scatter_add(1, indices, torch.ones_like(weights))
    assert (twice[:, :-1] <= 1).all(), "an expert in two slots"
    if choice.sums_to_one:
        torch.testing.assert_close((weights * (indices < EXPERTS)).sum(-1), torch.ones(tokens))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("text", ALL)
def test_nan_stays_in_range_and_is_seen(text: str, training: bool) -> None:
    torch.manual_seed(0)
    z = torch.randn(6, EXPERTS)
    z[2, 3], z[4] = torch.nan, torch.nan
    weights, indices = choose(text, z, training)
    assert ((indices >= 0) & (indices <= EXPERTS)).all()
    seen = (weights.isnan() & (indices < EXPERTS)).any(-1)
    assert seen[2]
    assert seen[4]
    if not text.startswith(("expert_choice", "sinkhorn")):  # which compare tokens
        assert not weights[[0, 1, 3, 5]].isnan().any()


def test_equal_scores_go_to_the_lower_index() -> None:
    z = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 1.0]]).repeat(40, 20)
    assert largest(z, 4).tolist() == [[1, 2, 4, 7]] * 40
    assert largest(z, 1).tolist() == [[1]] * 40


def test_temperature_and_squashing() -> None:
    z = torch.randn(9, 6)
    plain = torch.softmax(z, -1)
    dense: Any = torch.zeros(9, 6)
    for text, expected in [
        ("softmax_topk(6, T=1.0, pre_activation=none)", plain),
        ("softmax_topk(6, T=2.0)", torch.softmax(z / 2, -1)),
        ("softmax_topk(6, T=2.0, learned=True)", torch.softmax(z / 2, -1)),
        ("softmax_topk(6, T=0.5, pre_activation=tanh)", torch.softmax(torch.tanh(z) * 2, -1)),
        ("softmax_topk(6, pre_activation=sigmoid)", torch.softmax(torch.sigmoid(z), -1)),
    ]:
        weights, indices = choose(text, z)
        torch.testing.assert_close(dense.scatter(1, indices, weights), expected)


def test_a_schedule_moves_the_temperature() -> None:
    choice = Choice.parse("softmax_topk(2, T=exponential(2.0, 0.5, 10))")
    buffers = choice.buffers(4)
    seen: list[float] = []
    for step in (0, 5, 10, 99):
        choice.advance(buffers, step)
        seen.append(float(buffers["temperature"]))
    assert seen == pytest.approx([2.0, 1.0, 0.5, 0.5])


def test_only_a_learned_temperature_warns() -> None:
    assert "1 / log(n)" in Choice.parse("softmax_topk(2, learned=True)").note
    for text in ("softmax_topk(2, T=0.5)", "softmax_topk(2, learned=True, pre_activation=tanh)"):
        assert not Choice.parse(text).note


@pytest.mark.parametrize(
    ("text", "experts", "message"),
    [
        ("softmax_topk(3)", 2, "k=3 of 2"),
        ("sigmoid_topk(3, groups=4, limit=1)", 8, "k=3 of 2"),
        ("sigmoid_topk(2, groups=3)", 8, "8 experts in 3 groups"),
        ("dense(splits=3)", 8, "8 experts in 3 splits"),
        ("sinkhorn_topk(k=9)", 8, "k=9 of 8"),
        ("dense_to_sparse(k=9)", 8, "k=9 of 8"),
    ],
)
def test_refuses_numbers_that_do_not_go_together(text: str, experts: int, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Choice.parse(text).slots(experts)


@pytest.mark.parametrize(
    "text",
    [
        "softmax_topk(0)",
        "softmax_topk(2, T=0.0)",
        "softmax_topk(2, T=linear(1.0, 0.0, 9))",
        "softmax_topk(2, T=linear(1.0, 0.5, 9), learned=True)",
        "sigmoid_topk(2, groups=2, limit=3)",
        "expert_choice(capacity=0.0)",
        "threshold(t=-1.0)",
        "dense_to_sparse(threshold=1.0)",
        "sinkhorn_topk(p=0.0)",
        "noisy_topk(2, floor=0.0)",
    ],
)
def test_refuses_options_out_of_range(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"out of range|positive"):
        Choice.parse(text)
