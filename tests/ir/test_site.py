"""Sites: a name that they do not have is answered with those that they have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.site import MLP, Value, Weight


def _site() -> MLP:
    node = fx.Graph().placeholder("x")
    weights = {"up": Weight("net.up.weight", "out_in")}
    return MLP(
        owner="net",
        line="net.py:3",
        values={"in": Value(node, "bnc"), "out": Value(node, "bnc")},
        weights=weights,
        form="plain",
    )


def test_a_misspelt_value_names_what_there_is() -> None:
    with pytest.raises(SiteRefusedError, match=r"(?s)net net\.py:3: the mlp site has no value 'outt'.*'out'\?"):
        _site().values["outt"]
    with pytest.raises(KeyError, match=r"(?s)no weight 'gate'.*up.*reads\(\)"):
        _site().weights["gate"]


def test_they_are_mappings_still() -> None:
    site = _site()
    assert site.values.get("hidden") is None
    assert "in" in site.values
    assert site.find("hidden") is None
    assert dict(site.weights) == {"up": Weight("net.up.weight", "out_in")}
    again = pickle.loads(pickle.dumps(site.weights))
    with pytest.raises(SiteRefusedError, match="mlp site has no weight"):
        copy.deepcopy(again)["down"]
    assert torch.is_grad_enabled()
