"""gatecc.state_space.views: sites of models in the common form, against what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import ArgumentError
from gatecc.passes.mix.mixers import Hopfield, Liger, Linear, LoLCATs
from gatecc.passes.mix.mixers.decay import LowRank, Scalar
from gatecc.passes.mix.mixers.features import UnitMap
from gatecc.passes.mix.mixers.hopfield import HopfieldMixer
from tests.recipes.checks import case, randomise
from tests.recipes.tiny import reference, tiny

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(9))
MIXERS = (
    Linear(decay=LowRank(2), norm="rms", conv=2),
    Linear(UnitMap(), Scalar(), rule="delta"),
    Liger(window=3),
    Hopfield(2),
    LoLCATs(3),
)


@pytest.fixture(scope="module")
def mixed() -> torch.nn.Module:
    """A layer of each mixer and one of softmax."""
    plain = tiny(layers=len(MIXERS) + 1, causal=True)
    rewrites = [gatecc.Mix(gatecc.Attention[i], mixer) for i, mixer in enumerate(MIXERS)]
    model = gatecc.transform(plain, rewrites, (X,), scope="model", verify=False)
    randomise((p for name, p in model.named_parameters() if "mixer" in name), 0.5)
    return model


def test_every_mixer_in_one_form(mixed: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    own = HopfieldMixer.state_space

    def wrong(mixer: HopfieldMixer, *values: Tensor) -> gatecc.state_space.StateSpace:
        return own(mixer, *values).scaled(1.001)

    monkeypatch.setattr(HopfieldMixer, "state_space", wrong)
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    found = gatecc.state_space.views(mixed, (X,))
    assert [view.mixer for view in found] == ["linear", "linear", "liger", "hopfield", "lolcats", "softmax"]
    assert [None if view.form is None else (view.form.transition, view.form.state) for view in found] == [
        ("diagonal", 4),
        ("full", 4),
        ("diagonal", 4 + 7),
        ("identity", 7),
        None,
        ("identity", 7),
    ]
    assert [view.site for view in found if view.error > 1e-6] == ["blocks.3.attn#0"], "an error is an error"
    assert "no state space form" in str(found[4])
    assert all(torch.equal(value, before[name]) for name, value in mixed.state_dict().items())


def test_softmax_against_the_model_in_python() -> None:
    plain = tiny(layers=1, causal=True, fused=False)
    seen: list[Tensor] = []

    def at(place: str, layer: int, value: Tensor, **_: Any) -> Tensor:
        return value if place != "heads" else seen.append(value) or value

    (view,) = gatecc.state_space.views(plain, (X,))
    reference(plain, at).double()(X.double())
    assert view.form is not None
    assert torch.allclose(view.form.run()[0], seen[0], atol=1e-12)


@pytest.mark.parametrize("name", ["hf/llama-sdpa", "hf/gpt2-eager"])
def test_real_models(name: str) -> None:
    known = case(name)
    found = gatecc.state_space.views(known.model, (tuple(known.args), dict(known.kwargs)))
    assert found
    assert all(view.form is not None and view.error <= 1e-6 for view in found)


def test_a_site_that_looks_ahead_has_no_form() -> None:
    (view,) = gatecc.state_space.views(tiny(layers=1), (X,))
    assert view.form is None
    assert "look ahead" in view.refused
    with pytest.raises(ArgumentError, match="only attention"):
        gatecc.state_space.views(tiny(layers=1), (X,), gatecc.MLP[...])
