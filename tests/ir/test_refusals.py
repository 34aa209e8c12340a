"""Remedies name kinds of sites that the model has."""

from __future__ import annotations

import pytest

from gatecc.ir.refusals import CAUSES, fitted
from gatecc.ir.site import Refusal


def _remedy(code: str, *kinds: str) -> str:
    return fitted(Refusal(code, "merge", "net", "", "", CAUSES[code].remedy), kinds).remedy


def test_a_remedy_that_fits_stays() -> None:
    assert _remedy("GCC150", "embedding", "linear") == CAUSES["GCC150"].remedy
    assert _remedy("GCC171", "block", "residual") == CAUSES["GCC171"].remedy
    assert _remedy("GCC143") == CAUSES["GCC143"].remedy  # it names none


@pytest.mark.parametrize(
    ("code", "kinds", "told"),
    [
        ("GCC150", ("linear", "mlp"), "select sites that the model has: MLP, Linear"),
        ("GCC141", ("linear", "activation"), "select Linear or Activation sites: the model has no other that would do"),
        ("GCC150", (), "leave it as it is"),
    ],
)
def test_a_kind_that_the_model_lacks_is_left_out(code: str, kinds: tuple[str, ...], told: str) -> None:
    assert _remedy(code, *kinds) == told
