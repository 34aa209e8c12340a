"""Rewrites: how sites are given, and what a class of one's own forgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.rewrite import rewrite_from_json
from gatecc.ir.site import Site

SPEC = gatecc.GateSpec("hidden", "linear", "head", "sigmoid")
HEADS = gatecc.Attention[...].heads


@pytest.mark.parametrize("site", ["attention[...].heads", "attention", gatecc.Attention, HEADS])
def test_sites_as_text_as_a_kind_and_as_a_selector(site: Any) -> None:
    gate = gatecc.Gate(site, SPEC)
    assert gate == gatecc.Gate(HEADS, SPEC) == gatecc.Gate(site=site, gate=SPEC)
    assert replace(gate, site="attention[0]").site == gatecc.Attention[0]
    assert rewrite_from_json(gate.to_json()) == gate


@pytest.mark.parametrize("site", [None, 3, gatecc.Gate, Site])
def test_what_selects_nothing_is_said(site: Any) -> None:
    with pytest.raises(ArgumentError, match=r"(?s)selects no sites.*attention\[\.\.\.\]\.heads"):
        gatecc.Gate(site, SPEC)


@dataclass(frozen=True)
class Nameless(gatecc.Rewrite):
    def contract(self) -> Contract:
        return changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None: ...


@dataclass(frozen=True)
class Careless(gatecc.Rewrite):
    name = "careless"

    def contract(self) -> Contract:
        return None  # pyright: ignore[reportReturnType]

    def rewrite(self, site: Site, edit: Editor) -> None: ...


@pytest.mark.parametrize(
    ("rewrite", "told"),
    [
        (Nameless(HEADS), r"(?s)Nameless has no name.*name = \"nameless\""),
        (Careless(HEADS), r"(?s)contract\(\) of the rewrite careless.*None.*changes_function\(\)"),
    ],
)
def test_a_class_that_forgets_something(rewrite: gatecc.Rewrite, told: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 16)
    for recipe in (rewrite, [rewrite], gatecc.Recipe("mine", "", (rewrite,))):
        with pytest.raises(ArgumentError, match=told):
            gatecc.transform(layer, recipe, (torch.randn(2, 3, 16),))
