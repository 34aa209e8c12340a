"""Operators at the ends of their ranges: ONNX Runtime computes what float64 says, in every opset and dtype.

One graph holds all of them, for an export takes seconds. The values are torch's own in float64; float32 may be off by
some of its own roundings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.codegen.onnx.build import MODEL, build, write
from gatecc.codegen.onnx.leaves import flat_call
from gatecc.codegen.onnx.runtime import Session, check
from gatecc.codegen.onnx.stable import FORMS
from gatecc.scope.family import difference

pytest.importorskip("onnxruntime")
Operator = Callable[[Tensor], Tensor]
WIDE: dict[str, Operator] = {
    "logsigmoid": F.logsigmoid,
    "log of sigmoid": lambda x: torch.log(torch.sigmoid(x)),
    "root of sigmoid": lambda x: torch.sigmoid(x) ** (1 / 16),
    "odds": lambda x: torch.sigmoid(x) / (1 - torch.sigmoid(x)).clamp_min(1e-6),
    "ratio": lambda x: torch.sigmoid(x) / torch.sigmoid(x - 1),
    "product": lambda x: torch.sigmoid(x) * torch.exp(-x.clamp(-60, 60)),
    "int32 indices": lambda x: x.view(8, 21)[(x[:3] > 0).to(torch.int32), (x[3:6] > 0).to(torch.int32)],
    "two clamps": lambda x: x.clamp(-1.0, 1.0) + x.clamp(-1.0, 1.0).exp(),
    "complement": lambda x: torch.log(1 - torch.sigmoid(x).clamp(1e-6, 1 - 1e-6)),
    "softplus": F.softplus,
    "softplus, beta": lambda x: F.softplus(x, 2.0, 5.0),
    "log1p of exp": lambda x: torch.log1p(torch.exp(-x.abs())),
    "expm1": lambda x: torch.expm1(-x.abs()),
    "logaddexp": lambda x: torch.logaddexp(x, -x),
    "logaddexp, equal": lambda x: torch.logaddexp(x, x),
    "logaddexp2": lambda x: torch.logaddexp2(x, torch.zeros_like(x)),
    "silu": F.silu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 1.5),
    "tanh": torch.tanh,
    "exp2": lambda x: torch.exp2(-x.abs()),
    "cross-entropy": lambda x: F.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.25), reduction="none"),
    "minus a tensor": lambda x: torch.ops.aten.sub.Tensor(5.0, x),
    "clamp_min": lambda x: x.clamp(min=-3.0),
    "hypot": lambda x: torch.hypot(x, torch.ones_like(x)),
    "fmax": lambda x: torch.fmax(x, torch.zeros_like(x)),
    "copysign": lambda x: torch.copysign(torch.ones_like(x), x),
    "floor_divide": lambda x: torch.floor_divide(x, 0.25),
    "remainder": lambda x: torch.remainder(x, 3.0),
    "argsort, stable": lambda x: torch.argsort(x.sign(), stable=True).to(x.dtype),
    "sort, stable": lambda x: torch.sort(x.sign(), stable=True, descending=True)[1].to(x.dtype),
}
ROWS: dict[str, Operator] = {
    "softmax": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "log of softmax": lambda x: torch.log(F.softmax(x, -1)),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "logcumsumexp": lambda x: torch.logcumsumexp(x, -1),
    "cummax": lambda x: x.cummax(-1)[0],
    "nll": lambda x: F.nll_loss(F.log_softmax(x, -1), torch.arange(x.size(0)) % 3, reduction="none"),
    "cross-entropy": lambda x: F.cross_entropy(x.reshape(-1, 9), torch.arange(x.size(0)) % 3, label_smoothing=0.1),
}
NARROW: dict[str, Operator] = {
    "group_norm": lambda x: F.group_norm(x[:, :8], 2),
    "layer_norm": lambda x: F.layer_norm(x, (9,)),
    "rms_norm": lambda x: F.rms_norm(x, (9,), eps=1e-6),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "cumprod": lambda x: x.tanh().cumprod(-1),
    "rsqrt": lambda x: torch.rsqrt(x * x + 1e-12),
    "a small epsilon": lambda x: (x - 1) / ((x - 1).abs() + 1e-9),
    "logit": lambda x: torch.logit(x.tanh() / 2 + 0.5, 1e-6),
    "cdist": lambda x: torch.cdist(x, x.flip(0)),
}
NO_FLOAT16 = (
    "cdist",
    "odds",
    "complement",
    "log of softmax",
    "log of sigmoid",
    "root of sigmoid",
)  # torch has none, or


class All(nn.Module):
    """Every operator on its values: each output is a key of the result."""

    def __init__(self, leave_out: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.tables = [{k: f for k, f in table.items() if k not in leave_out} for table in (WIDE, ROWS, NARROW)]

    def forward(self, wide: Tensor, rows: Tensor, narrow: Tensor) -> dict[str, Tensor]:
        return {
            f"{i} {name}": function(x)
            for i, (table, x) in enumerate(zip(self.tables, (wide, rows, narrow), strict=True))
            for name, function in table.items()
        }


def values(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers over the whole range of the operators, rows with infinities, and rows whose mean is large."""
    grid = torch.cat([torch.linspace(-100, 100, 161), torch.tensor([1e-7, -1e-7, 1e-4, -1e-4, -0.0, 1e4, -1e4])])
    rows = torch.randn(6, 9)
    rows = torch.stack([rows[0], rows[1] * 100, rows[2] - 1e3, rows[3], torch.zeros(9), rows[5] * 1e-6])
    rows[3, ::2] = -math.inf
    narrow = torch.randn(5, 9)
    narrow = torch.stack([narrow[0], narrow[1] * 1e-3, narrow[2] * 1e3, 1e3 + narrow[3], torch.ones(9)])
    wide, rows, narrow = (x.to(dtype) for x in (grid, rows, narrow))
    return wide, rows, narrow


@pytest.mark.broad(2)
@pytest.mark.parametrize(("dtype", "opset"), [("float32", 24), ("float32", 18), ("float64", 24), ("float16", 24)])
@torch.no_grad()
def test_the_ends_of_the_ranges(dtype: str, opset: int, tmp_path: Path) -> None:
    kind: torch.dtype = getattr(torch, dtype)
    module, given = All(NO_FLOAT16 if kind is torch.float16 else ()), values(kind)
    call = flat_call(module, given, {})
    graph = build(call, opset, {}, {})
    write(graph, tmp_path)
    check(tmp_path / MODEL, graph.places)
    found = Session(tmp_path / MODEL, graph.places).run(call.inputs, call.leaves)
    exact = module(*(x.double() for x in given))
    bar = {torch.float64: 1e-8}.get(kind, 32 * torch.finfo(kind).eps)  # attributes of ONNX nodes are float32
    wrong: dict[str, tuple[float, float]] = {}
    for (name, wide), torchs, y in zip(exact.items(), call.results, found, strict=True):
        finite = torch.isfinite(torchs)  # where torch overflows there is nothing to be as good as
        error, own = (difference(wide.where(finite, 0.0), x.double().where(finite, 0.0)) for x in (y, torchs))
        if not error <= max(bar, 4 * own):
            wrong[name] = (error, own)
    assert not wrong


@pytest.mark.parametrize("sensitive", [True, False])
def test_only_sigmoids_that_are_read_closely_are_spelled_out(sensitive: bool) -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(x).unsqueeze(0) * 2
            return torch.rsqrt(gate) if sensitive else gate * torch.rsqrt((gate * x).pow(2).mean(-1, keepdim=True) + 1)

    with torch.no_grad():
        operators = build(flat_call(Gate(), (torch.randn(2, 3),), {}), 24, {}, {}).operators
    assert ("Sigmoid" in operators) is not sensitive


@pytest.mark.parametrize("operator", [op for op in FORMS if "backward" not in str(op)], ids=str)
def test_every_form_is_of_an_operator_that_torch_has(operator: object) -> None:
    assert isinstance(operator, torch._ops.OpOverload)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_running_maximum_by_comparisons(dim: int) -> None:
    x = torch.tensor([[3, 1, 4, 1, 5], [2, 2, 6, 0, 6], [7, 0, 1, 8, 8]])
    for got, wanted in zip(FORMS[torch.ops.aten.cummax.default](x, dim), x.cummax(dim), strict=True):
        assert torch.equal(got, wanted)
