"""Synthetic example inputs: the form of the user's inputs without what is in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gatecc.checkpoint.examples import special_ids, structural, synthetic

LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
FORM: dict[str, Tensor] = {
    "padding": LEFT,
    "a bool mask": CAUSAL[None],
    "an additive mask": torch.zeros(5, 5).masked_fill(~CAUSAL, torch.finfo(torch.float32).min),
    "positions": torch.arange(6)[None].expand(2, -1),
    "positions of padded rows": (LEFT.cumsum(-1) - 1).clamp(min=0),
    "packed rows": torch.tensor([[0, 1, 2, 0, 1, 0]]),
    "segments": torch.tensor([[1, 1, 2, 2, 2, 3]]),
    "offsets": torch.tensor([0, 5, 9, 20], dtype=torch.int32),
}


@pytest.mark.parametrize("name", FORM)
def test_form_is_kept(name: str) -> None:
    assert structural(FORM[name])
    assert torch.equal(synthetic(FORM[name], (), 0), FORM[name])


CONTENT: dict[str, Tensor] = {
    "an image": torch.rand(2, 3, 8, 8),
    "a photo": torch.randint(0, 255, (2, 8, 8, 3), dtype=torch.uint8),
    "half": torch.randn(2, 9, dtype=torch.bfloat16),
    "tokens": torch.randint(5, 900, (2, 12)),
    "a drawing in black and white": torch.randint(0, 2, (2, 1, 9, 9)).float(),
    "patches that are left out": torch.rand(2, 16).argsort(-1) < 5,
    "a spectrum": torch.randn(3, 7, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", CONTENT)
def test_content_is_drawn_anew(name: str) -> None:
    x = CONTENT[name]
    made = synthetic(x, (), 0)
    assert (made.shape, made.dtype) == (x.shape, x.dtype)
    assert not torch.equal(made, x)
    assert torch.equal(made, synthetic(x, (), 0))
    if not x.is_complex():
        assert made.min() >= x.min()
        assert made.max() <= x.max()
    if x.dtype == torch.bool:
        assert torch.equal(made.sum(-1), x.sum(-1))


def test_special_ids_and_padding_stay_where_they_are_and_come_nowhere_else() -> None:
    rows = torch.tensor([[1, 40, 50, 60, 2, 7, 7, 7], [1, 44, 9, 61, 35, 23, 52, 2]])
    made = synthetic(rows, {1, 2}, 0)
    special = (rows == 1) | (rows == 2)
    assert torch.equal((made == 1) | (made == 2), special)
    assert torch.equal(made[special], rows[special])
    assert (made[0, 5:] == 7).all()
    assert int((made == 7).sum()) == 3
    assert not torch.equal(made, rows)


def test_infinities_stay() -> None:
    x = torch.tensor([[0.5, float("inf"), float("nan"), -2.0, 3.0]])
    made = synthetic(x, (), 0)
    assert torch.equal(made.isfinite(), x.isfinite())
    assert made[0, 1] == float("inf")


def test_a_configuration_names_its_special_ids() -> None:
    class Config:
        def to_dict(self) -> dict[str, object]:
            return {"eos_token_id": [7, 8], "vision": {"image_token_index": 99}, "num_heads": 4, "pad_token_id": None}

    model = nn.Sequential(nn.Linear(2, 2))
    vars(model[0])["config"] = Config()
    assert special_ids(model) == {7, 8, 99, -100}
