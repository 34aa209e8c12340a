"""A forward that casts parts of its model: what changes nothing is no part of the graph, what does is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gatecc.capture import capture
from gatecc.errors import CaptureError

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Casts(nn.Module):
    """Its router is cast as transformers' Switch does, a norm in place."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.router = self.router.to(torch.float32)
        self.norm.float()
        return self.norm(self.router(x))


def test_a_cast_to_the_dtype_that_it_has_is_left_out() -> None:
    model = Casts().eval()
    before, apply = dict(model.named_parameters()), nn.Module._apply
    program = capture(model, (X,))
    called = [str(n.target) for n in program.graph_module.graph.nodes if n.op == "call_function"]
    assert called == ["aten.linear.default", "aten.batch_norm.default"]
    assert nn.Module._apply is apply
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}


def test_a_cast_that_changes_the_model_is_refused_by_its_line() -> None:
    model = Casts().eval().half()
    line = Casts.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"Linear: torch.float16 .* to torch.float32 .*\(test_casts.py:{line}\)"):
        capture(model, (X,))
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def test_other_values_are_refused_too() -> None:
    class Doubles(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self._apply(lambda weight: weight * 2)
            return super().forward(input)

    with pytest.raises(CaptureError, match="Doubles: other values"):
        capture(Doubles(4, 4), (X,))
