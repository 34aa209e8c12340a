"""Experts in ONNX: every layout and combination, any number of tokens, empty slots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from tests.ops.moe_ffn.cases import operands

ort: Any = pytest.importorskip("onnxruntime")
E, K, D = 3, 2, 6
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"layout": "plain", "activation": "relu", "biased": True, "combine": "slots", "o": 4},
    "interleaved": {"layout": "interleaved", "biased": True},
    "gpt-oss": {"layout": "interleaved", "activation": "swiglu", "biased": True},
    **{name: {"activation": name} for name in ("silu", "gelu", "mish")},
}


class Routed(nn.Module):
    """Two of three experts a token, chosen by its own numbers; slots of little weight are empty."""

    def __init__(self, forms: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.randn(E, D))
        self.experts, self.options = nn.ModuleList(), list[dict[str, Any]]()
        for form in forms.values():
            given = operands(1, D, 5, E, K, **form)
            held = {n: x.float() for n, x in given.items() if isinstance(x, Tensor) and n not in ("x", "weights")}
            held.pop("indices")
            self.experts.append(nn.ParameterDict({n: nn.Parameter(x) for n, x in held.items()}))
            self.options.append({n: given[n] for n in ("activation", "layout", "combine") if n in given})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, N, D)"""
        rows = x.flatten(0, 1)
        weights, indices = (rows @ self.router.T).softmax(-1).topk(K, -1)
        indices = torch.where(weights < 0.2, E, indices)
        found: list[Tensor] = []
        experts: list[Any] = list(self.experts)
        for held, options in zip(experts, self.options, strict=True):
            found.append(torch.ops.gatecc.moe_ffn(rows, weights, indices, **dict(held.items()), **options))
        return tuple(y.unflatten(0, x.shape[:2]) for y in found)


def test_every_form(tmp_path: Path) -> None:
    made = gatecc.export(Routed(FORMS), tmp_path / "out", (torch.randn(2, 7, D),))
    assert made.inputs == {"x": ["batch", "sequence", D]}
    assert {c.sizes["batch"] for c in made.compared} == {1, 3}
    assert made.operators["Gemm"] == 2 * E * len(FORMS)
    assert not [name for name in made.operators if "::" in name or name in ("Mod", "Floor")]


@pytest.mark.parametrize(("opset", "dtype"), [(18, torch.float32), (24, torch.float16)])
def test_any_number_of_tokens(tmp_path: Path, opset: int, dtype: torch.dtype) -> None:
    model = Routed({"silu": {"activation": "silu"}}).to(dtype).eval()
    gatecc.export(model, tmp_path / "out", (torch.randn(2, 3, D, dtype=dtype),), opset=opset, verify=opset == 18)
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    for tokens in (1, 2, 29):
        x = torch.randn(1, tokens, D, dtype=dtype)
        (found,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            bar = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(torch.from_numpy(found), model(x)[0], rtol=bar, atol=bar)
