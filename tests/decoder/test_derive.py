"""What has no decoder is refused by name, and a decoder that would differ from its model is never returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.decoder import derive
from gatecc.decoder.analysis.labels import Labels
from gatecc.decoder.rules import scan
from gatecc.errors import DecoderError, ExampleInputsError
from tests.decoder.mixing import D, Mixed, RunningMean, V
from tests.decoder.stepping import difference, full, stepped
from tests.zoo import SPECS


@pytest.mark.parametrize("name", ["hand/sdpa", "hand/padded"])
def test_a_mask_that_is_not_causal_is_refused(name: str) -> None:
    case = SPECS[name].build()
    with pytest.raises(DecoderError, match="does not prove causal") as raised:
        gatecc.decoder(case.model, case.inputs)
    assert raised.value.where


class Fixed(nn.Module):
    """A loop over the length."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        rows = [x[:, 0]]
        for i in range(1, x.shape[1]):
            rows.append(0.5 * rows[-1] + x[:, i])
        return torch.stack(rows, 1)


class Last(nn.Module):
    """Adds the last token to all."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return x[:, -1:]


@pytest.mark.parametrize(("mixer", "reason"), [(Fixed(), "one length"), (Last(), "mixes positions")])
def test_what_cannot_be_said_per_token_is_refused(mixer: nn.Module, reason: str) -> None:
    with pytest.raises(DecoderError, match=reason):
        gatecc.decoder(Mixed(mixer).eval(), (torch.randint(V, (2, 16)),))


def test_a_wrong_decoder_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_carry(*_: Any, **__: Any) -> None:
        return None

    monkeypatch.setattr(scan, "_cumulative", without_carry)
    monkeypatch.setattr(Labels, "forbid", without_carry)
    with pytest.raises(DecoderError, match="does not compute what the model does"):
        derive.decoder(Mixed(RunningMean()).eval(), (torch.randint(V, (2, 16)),))


def test_one_short_text_is_example_enough() -> None:
    case = SPECS["hand/sdpa_causal"].build()
    ids = case.args[0]
    made = gatecc.decoder(case.model, (ids[:1, :1],))
    assert difference(full(case.model, ids), stepped(made, ids)) <= 1e-5


def test_gates_act_in_every_step() -> None:
    case = SPECS["hand/sdpa_causal"].build()
    ids = case.args[0]
    gated = gatecc.transform(case.model, "gated-attention", (ids,), verify=False)
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if "gate" in name and "gate_proj" not in name:
                parameter.normal_()
    made = gatecc.decoder(gated, (ids,))
    expected = full(gated, ids)
    assert difference(full(gatecc.revert(gated), ids), expected) > 1e-2
    assert difference(expected, stepped(made, ids)) <= 1e-5


def test_no_tokens() -> None:
    model = Mixed(nn.Linear(D, D)).eval()
    with pytest.raises(ExampleInputsError, match="no tokens"):
        gatecc.decoder(model, (torch.tensor(3),))
    with pytest.raises(ExampleInputsError, match=r"(?s)shape \(1, 3, 8, 8\).*models that predict tokens"):
        gatecc.decoder(nn.Conv2d(3, 4, 3), (torch.randn(1, 3, 8, 8),))
