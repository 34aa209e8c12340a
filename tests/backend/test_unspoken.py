"""explain says what no lowering speaks of: products over pairs of tokens that are read by a second product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gatecc
from gatecc.report import LoweringRow

Mix = Callable[[Tensor, Tensor, Tensor], Any]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores(q, k).relu().square()
    return weights @ v, weights


def over_other_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    power = scores(q, k).exp()
    return power / power.sum(1, keepdim=True) @ v


def hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.arange(q.size(2)) % 3 > 0
    return torch.where(seen, scores(q, k).sigmoid(), 0.0) @ v


CASES: dict[str, tuple[Mix, str]] = {
    "softmax over heads": (lambda q, k, v: scores(q, k).softmax(1) @ v, "softmax does not run over"),
    "exponentials": (lambda q, k, v: scores(q, k).exp() @ v, "exp"),
    "exponentials over heads": (over_other_keys, "exp"),
    "squares, also returned": (returned, "relu"),
    "sigmoids behind a mask": (hidden, "sigmoid"),
    "summed over queries": (lambda q, k, v: torch.einsum("bhnm,bhnd->bhmd", scores(q, k).tanh(), v), "tanh"),
    "distances": (lambda q, k, v: torch.cdist(q, k).neg().exp() @ v, "exp"),
    "a transposed view": (lambda q, k, v: scores(q, k).relu().flatten(0, 1).mT @ v.flatten(0, 1), "relu"),
    "no function": (lambda q, k, v: scores(q, k) @ v, "costs less if it comes first"),
}
KNOWN: dict[str, Mix] = {
    "softmax": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "softmax that is refused": lambda q, k, v: (scores(q, k).softmax(-1) * 0.5) @ v,
    "a state": lambda q, k, v: q.relu() @ (k.relu().mT @ v),
    "one product": lambda q, k, v: scores(q, k).relu().sum(-1) * v.sum(-1),
    "a product with a matrix": lambda q, k, v: scores(q, k).relu() @ WIDE + v.sum(),
    "causal": lambda q, k, v: scores(q, k).tril() @ v,
}
WIDE = torch.randn(12, 3)


class Mixing(nn.Module):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.mix = mix

    def forward(self, x: Tensor) -> Any:
        return self.mix(*x.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4))


class All(nn.Module):
    def __init__(self, mixes: dict[str, Mix]) -> None:
        super().__init__()
        self.each = nn.ModuleList(map(Mixing, mixes.values()))

    def forward(self, x: Tensor) -> list[Any]:
        return [one(x) for one in self.each]


def rows(model: nn.Module, *inputs: Tensor) -> list[LoweringRow]:
    found = gatecc.explain(model, inputs)
    assert not found.notes
    return [row for row in found.lowered if row.lowering == "none"]


def test_each_has_one_row_with_owner_line_and_reason() -> None:
    found = rows(All({name: mix for name, (mix, _) in CASES.items()}), torch.randn(2, 12, 24))
    assert [row.owner for row in found] == [f"each.{i}" for i in range(len(CASES))]
    for row, (name, (mix, said)) in zip(found, CASES.items(), strict=True):
        lines = {line for *_, line in mix.__code__.co_lines()}
        assert int(row.line.removeprefix("test_unspoken.py:")) in lines, name
        assert said in row.found + row.reason, (name, row)
        assert row.reason.endswith("(GCC108)")
        assert not row.became


def test_what_a_lowering_speaks_of_has_none() -> None:
    assert not rows(All(KNOWN), torch.randn(2, 12, 24, requires_grad=True))


def test_two_on_one_line() -> None:
    """What is said of one is not said of the other."""
    both = Mixing(lambda q, k, v: scores(q, k).softmax(-1) @ v + scores(q, k).relu() @ v)
    (row,) = rows(both, torch.randn(2, 12, 24))
    assert "relu" in row.found


def test_models_of_others() -> None:
    from transformers import NystromformerConfig, ViTConfig, ViTModel
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = NystromformerConfig(**sizes, num_landmarks=2, segment_means_seq_len=8)  # the model's mask does not fit it
    found = rows(NystromformerSelfAttention(config).eval(), torch.randn(1, 8, 16))
    assert found
    assert all("modeling_nystromformer" in row.line for row in found)
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    vit = ViTConfig(**sizes, **eager, image_size=16, patch_size=4)
    assert not rows(ViTModel(vit).eval(), torch.randn(1, 3, 16, 16))
