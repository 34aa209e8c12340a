"""torch's fused encoder paths go past the modules that they hold: a rewritten encoder does the same in every mode.

A gate of 0 on a head is the plain encoder with zeros in the columns of the output projection that read this head; that
encoder is run by torch, on whatever path torch takes.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import CallNotCapturedError, ContractError

WIDTH, HEADS = 16, 4
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 4 + [True] * 3])


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def inputs(padded: bool = True) -> dict[str, Any]:
    x = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    return {"src": x, "src_key_padding_mask": PADDING} if padded else {"src": x}


def closed(gated: nn.Module) -> nn.Module:
    """The first two heads of every layer are shut, the others are as they were."""
    with torch.no_grad():
        for layer in range(2):
            gated.get_parameter(f"layers.{layer}.self_attn.gate.bias")[:2] = -200.0
    return gated


@pytest.fixture(scope="module")
def expected() -> Tensor:
    plain = encoder()
    with torch.no_grad():
        for layer in plain.layers:
            layer.get_parameter("self_attn.out_proj.weight")[:, : 2 * WIDTH // HEADS] = 0
        return plain(**inputs())[~PADDING]


@pytest.fixture(scope="module")
def gated() -> nn.Module:
    return closed(gatecc.transform(encoder(), "gated-attention", inputs()))


def check(model: Callable[..., Tensor], expected: Tensor) -> None:
    for name, mode in MODES.items():
        with mode():
            got = model(**inputs())[~PADDING]
        assert torch.allclose(got, expected, atol=1e-5), name


def test_modes(gated: nn.Module, expected: Tensor) -> None:
    check(gated, expected)
    frozen = copy.deepcopy(gated).requires_grad_(False)  # then the fused path is open with gradients on, too
    check(frozen, expected)
    assert "fused path is off in layers.0, " in str(gatecc.last_report(gated).notes)


def _reload(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _reload], ids=["deepcopy", "pickle", "save"]
)
def test_copies(copied: Callable[[nn.Module], nn.Module], gated: nn.Module, expected: Tensor) -> None:
    check(copied(gated), expected)


@pytest.mark.parametrize("mode", [None, "aot_eager"])
def test_compiled(mode: str | None, gated: nn.Module, expected: Tensor) -> None:
    if mode is None:
        compiled = torch.compile(gated, fullgraph=True, backend="aot_eager")
    else:
        compiled = torch.compile(gated, fullgraph=True, backend="gatecc", mode=mode)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs())[~PADDING], expected, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, gated: nn.Module, expected: Tensor) -> None:
    with torch.no_grad():
        program = torch.export.export(gated, (), inputs(), strict=strict)
        assert torch.allclose(program.module()(**inputs())[~PADDING], expected, atol=1e-5)


def test_second_transform_and_revert(gated: nn.Module, expected: Tensor) -> None:
    twice = gatecc.transform(gated, "residual-gates", inputs())  # identity at init
    check(twice, expected)
    back: Any = gatecc.revert(twice)
    plain: Any = encoder()
    assert back.use_nested_tensor is plain.use_nested_tensor is True
    assert back.layers[1].activation_relu_or_gelu == plain.layers[1].activation_relu_or_gelu == 1
    with torch.no_grad():
        assert torch.equal(back(**inputs()), plain(**inputs()))  # zeros where it is padded: the fused path again


def test_after_an_error_an_inplace_model_keeps_its_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ContractError("broken")

    monkeypatch.setattr(importlib.import_module("gatecc.transform"), "check", broken)
    plain: Any = encoder()
    with pytest.raises(ContractError):
        gatecc.transform(plain, "gated-attention", inputs(), inplace=True)
    assert plain.use_nested_tensor
    assert plain.layers[0].activation_relu_or_gelu == 1


def test_a_nested_tensor_of_the_caller_is_refused(gated: nn.Module) -> None:
    nested = torch.nested.nested_tensor([torch.randn(5, WIDTH), torch.randn(7, WIDTH)])
    with torch.no_grad(), pytest.raises(CallNotCapturedError, match="nested tensor"):
        gated(nested)
