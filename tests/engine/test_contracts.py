"""check: outputs before and after a transform, compared leaf by leaf."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.engine.contracts import Checked, check, compare, reference
from gatecc.errors import ContractError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site
from tests.recipes.tiny import tiny

T = torch.tensor


@pytest.mark.parametrize(
    ("expected", "got", "error"),
    [
        (T([1.0, -2.0]), T([1.0, -2.5]), 0.25),
        (T([True, False]), T([True, False]), 0.0),
        (T([True, False]), T([True, True]), 1.0),
        (T([3], dtype=torch.uint8), T([4], dtype=torch.uint8), 1 / 3),
        (T([4, 7]), T([4, 7]), 0.0),
        (T([1 + 1j]), T([1 + 1j]), 0.0),
        (T([]), T([]), 0.0),
        ((T([1.0]), None), (T([1.0]), T([1.0])), float("inf")),
        ({"a": T([1.0])}, {"b": T([1.0])}, float("inf")),
        (T([1.0]), T([1.0]).double(), float("inf")),
        ((T([1.0]), 2), (T([1.0]), 3), float("inf")),
        ((T([1.0]), "a"), (T([1.0]), "a"), 0.0),
        (T([float("nan")]), T([float("nan")]), 0.0),
        (T([float("inf")]), T([1.0]), float("inf")),
    ],
)
def test_compare(expected: Tensor | Any, got: Tensor | Any, error: float) -> None:
    assert compare(expected, got) == pytest.approx(error)


def test_an_output_that_torch_cannot_look_into_is_noted() -> None:
    class Opaque:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Opaque:
            return Opaque(x)

    assert "no output was compared" in reference(Model(), (torch.ones(2),), {}).notes[0]
    assert not reference(nn.ReLU(), (torch.ones(2),), {}).notes


def test_a_small_difference_is_looked_for_in_the_parts() -> None:
    """What float32 rounds is no broken contract; what a part of the model shows as well, or what is large, is one."""
    x = torch.randn(2, 7, 16)
    plain = tiny(layers=1)
    recipe = gatecc.recipe("gated-attention")
    gated = gatecc.transform(plain, recipe, (x,), verify=False)

    def checked(error: float) -> Checked:
        before = reference(plain, (x,), {})
        before.outputs = [out + error for out in before.outputs]  # as if the original had rounded otherwise
        return check(before, gated, recipe, (x,), {})

    assert checked(0.0).notes == ()
    (note,) = checked(3e-5).notes
    assert note.endswith("no part of the model by more than 0.0e+00: rounding")
    with pytest.raises(ContractError):
        checked(3e-2)
    gated.get_parameter("blocks.0.attn.gate.bias").data += 1e-4
    with pytest.raises(ContractError):
        checked(0.0)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gated-attention", {"fuse_into": "q"}), ("gated-attention", {"init": "identity(how=fold)"}), ("upcycle", {})],
)
def test_float64_knows_the_weights_of_the_original(name: str, options: dict[str, Any]) -> None:
    """Also where a rewrite has widened or scaled them or taken them out."""
    x = torch.randn(2, 7, 16)
    plain, recipe = tiny(layers=1), gatecc.recipe(name, **options)
    changed = gatecc.transform(plain, recipe, (x,), verify=False)
    before = reference(plain, (x,), {})
    before.outputs = [out + 3e-5 for out in before.outputs]  # as if the original had rounded otherwise
    (note,) = check(before, changed, recipe, (x,), {}).notes
    assert float(note.rpartition("more than ")[2].removesuffix(": rounding")) < 1e-6


@dataclass(frozen=True)
class Times(Rewrite):
    """Multiplies a value by a constant, and promises that it keeps the function, or not."""

    name = "times"
    factor: float = 1.0
    promises: bool = True

    def contract(self) -> Contract:
        return identity_at_init() if self.promises else changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None:
        node = site.values[self.site.stage].node
        edit.replace(node, edit.call(torch.mul, node, self.factor, name="product"))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_rewrite_that_changes_the_function_does_not_hide_one_that_must_not(inplace: bool) -> None:
    x = torch.randn(2, 7, 16)
    doubles, out = Times(gatecc.Attention[...].heads, 2.0, promises=False), gatecc.Attention[...].out
    plain = tiny(layers=1).eval()
    expected = plain(x)
    with pytest.raises(ContractError) as caught:
        gatecc.transform(plain, [doubles, Times(out, 1.5)], (x,), inplace=inplace)
    assert caught.value.where.startswith("times attention[...].out at blocks.0.attn#0")
    assert torch.equal(plain(x), expected)
    changed = gatecc.transform(plain, [doubles, Times(out)], (x,), inplace=inplace)
    assert any("checked without the others" in note for note in gatecc.last_report(changed).notes)
    assert not torch.allclose(changed(x), expected, atol=1e-3)


def test_a_model_that_changes_its_input_in_place_leaves_the_callers_alone() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny(layers=1)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            state += 1
            x.mul_(2)
            return self.inner(x) + state

    x, state = torch.randn(2, 7, 16), torch.zeros(2, 7, 16)
    before = x.clone()
    model = InPlace().eval()
    gated = gatecc.transform(model, "gated-attention", (x, state))
    assert torch.equal(x, before)
    assert not state.any()
    assert torch.allclose(gated(x.clone(), state.clone()), model(x.clone(), state.clone()), atol=1e-6)


class ByMode(nn.Module):
    """Computes in bfloat16 where no gradients are asked for; or under a switch that a graph does not hold."""

    def __init__(self, switch: bool) -> None:
        super().__init__()
        self.block = tiny().get_submodule("blocks.0")
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        if self.switch:
            torch.set_autocast_enabled("cpu", True)
            try:
                return self.block(x)
            finally:
                torch.set_autocast_enabled("cpu", False)
        with torch.autocast("cpu", torch.bfloat16, enabled=not torch.is_grad_enabled()):
            return self.block(x)


def test_a_model_that_computes_otherwise_without_gradients_is_compared_there() -> None:
    model, x = ByMode(switch=False).eval(), torch.randn(2, 6, 16)
    gated = gatecc.transform(model, "gated-attention", (x,))
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.allclose(gated(x), model(x), atol=1e-6)


def test_a_capture_that_misses_what_the_module_does_is_not_blamed_on_the_rewrites() -> None:
    with pytest.raises(ContractError, match="captured graph does not compute what the module does"):
        gatecc.transform(ByMode(switch=True).eval(), "gated-attention", (torch.randn(2, 6, 16),), scope="model")
