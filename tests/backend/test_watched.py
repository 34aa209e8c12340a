"""A graph whose mask was proved from a buffer is run only while the buffer holds that mask."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from gatecc import backend


class Buffered(nn.Module):
    """Attention over x: (B, N, 8) whose causal mask is a buffer, spelled out or fused."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.ones(16, 16, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-2]
        seen, q = self.seen[:n, :n], x[:, None]
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, q, q, seen)
        return (q @ q.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ q


@pytest.mark.parametrize("fused", [True, False])
def test_a_mask_that_changes(fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    model, x = Buffered(fused), torch.randn(2, 5, 8)
    graphs: list[backend.Lowered] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Any:
        graphs.append(backend.lower(graph_module, example))
        return backend.gatecc(graph_module, example, mode="eager")

    compiled = torch.compile(model, backend=spy)
    torch.testing.assert_close(compiled(x), model(x))
    assert graphs[0].assumed
    assert any("causal" in outcome.became for outcome in graphs[0].outcomes)
    model.seen.copy_(model.seen.clone())  # the same values
    torch.testing.assert_close(compiled(x), model(x))
    assert not [r for r in caplog.records if "gatecc:" in r.message]
    model.seen[0, 3] = True
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))
    warned = [r.message for r in caplog.records if "gatecc:" in r.message]
    assert len(warned) == 1
    assert "a buffer that a mask was proved from has changed" in warned[0]
    model.seen[0, 3] = False
    torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


def test_buffers_of_inference_mode_have_no_version() -> None:
    torch._dynamo.reset()
    with torch.inference_mode():
        model, x = Buffered(True), torch.randn(2, 5, 8)
        compiled = torch.compile(model, backend="gatecc", mode="eager")
        torch.testing.assert_close(compiled(x), model(x))
        model.seen[0, 3] = True
        torch.testing.assert_close(compiled(x), model(x))


def another_storage(mask: torch.Tensor) -> None:
    mask.data = torch.ones_like(mask)


def written_through_data(mask: torch.Tensor) -> None:
    mask.data.fill_(True)


@pytest.mark.parametrize("change", [another_storage, written_through_data])
@pytest.mark.parametrize("size", [16, 200])
def test_a_change_that_counts_no_version_up(change: Callable[[torch.Tensor], None], size: int) -> None:
    torch._dynamo.reset()
    model, x = Buffered(True), torch.randn(2, 5, 8)
    model.seen = torch.ones(size, size, dtype=torch.bool).tril()
    compiled = torch.compile(model, backend="gatecc", mode="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
    before = compiled(x)
    change(model.seen)
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), before)
