"""Experts that are the same: found, counted against k, said in the report."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.engine import duplicates
from gatecc.recipes import samples


@pytest.fixture(scope="module")
def mixtral() -> nn.Module:
    return samples.mixture()[0]


def experts(model: nn.Module) -> Any:
    return next(m for name, m in model.named_modules() if name.endswith("experts"))


def test_copies_of_one_expert_warn(mixtral: nn.Module) -> None:
    (row,) = gatecc.diagnose.duplicates(mixtral)
    assert (row.experts, row.alike, row.k, row.too_few) == (4, 1, 2, False)
    assert not list(duplicates.notes(mixtral, ()))
    made = experts(mixtral)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    with torch.no_grad():
        for copies in (2, 3, 4):
            for p in made.parameters():
                p[:copies] = p[0] * 2
            (row,) = gatecc.diagnose.duplicates(mixtral)
            assert (row.alike, row.too_few) == (copies, True)
        (note,) = duplicates.notes(mixtral, {id(p) for p in mixtral.parameters()})
        assert "4 of 4 experts are the same (cosine above 0.999), and 2 run for a token" in note
        for name, p in made.named_parameters():
            p.copy_(before[name])


def test_a_larger_k_is_enough(mixtral: nn.Module) -> None:
    made = experts(mixtral)
    with torch.no_grad():
        for p in made.parameters():
            p[1] = p[0] * 0.9 + p[1] * 1e-4
    (row,) = gatecc.diagnose.duplicates(mixtral)
    assert row.alike == 2
    assert row.too_few
    block: Any = next(m for m in mixtral.modules() if getattr(m, "experts", None) is made)
    block.top_k = 3
    assert not gatecc.diagnose.duplicates(mixtral)[0].too_few


def test_upcycled_copies_start_equal() -> None:
    model, inputs = samples.language()
    routed = gatecc.transform(model, gatecc.recipe("upcycle", experts=4), inputs)
    notes = [note for note in gatecc.last_report(routed).notes if "experts start equal" in note]
    assert len(notes) == 1
    assert "blocks.0.mlp.experts and 1 more: 4 of 4 experts start equal, and 2 run for a token" in notes[0]
    noisy = gatecc.transform(model, gatecc.recipe("evomoe", experts=4, share=0.3), inputs)
    assert not [note for note in gatecc.last_report(noisy).notes if "start equal" in note]
