"""Which calls of experts the GPU kernels take, and what is said of the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from gatecc.codegen.notice import say_once
from gatecc.ops.moe_ffn import moe_ffn
from gatecc.ops.moe_ffn.arguments import Arguments, arguments
from gatecc.ops.moe_ffn.kernels import KERNELS
from gatecc.ops.moe_ffn.triton import dispatch as gpu
from tests.ops.moe_ffn.cases import operands, to


class Fake:
    """The launcher, without Triton: it remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Arguments] = []

    def forward(self, a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None]:
        self.given.append(a)
        return a.x.new_zeros(a.output_shape), a.x.new_zeros(a.hidden_shape) if keep else None


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """CPU tensors go to the GPU's kernels, which are fakes."""
    fake = Fake()
    monkeypatch.setitem(KERNELS, "cpu", gpu.GpuKernels())
    monkeypatch.setattr(gpu.LAUNCHER, "module", lambda: fake)
    monkeypatch.setattr(gpu.LAUNCHER, "missing", lambda _: None)
    say_once.cache_clear()
    return fake


def test_the_kernels_serve_gpus() -> None:
    assert isinstance(KERNELS["cuda"], gpu.GpuKernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_taken(launcher: Fake, dtype: torch.dtype, training: bool) -> None:
    given = to(operands(), dtype)
    y = moe_ffn(**{**given, "x": given["x"].requires_grad_(training)})
    assert y.requires_grad is training
    assert [a.x.dtype for a in launcher.given] == [dtype]


DECLINED: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "float64": ({}, torch.float64, "torch.float64 has no kernel"),
    "no tokens": ({"T": 0}, torch.float32, "without rows or columns"),
    "no slots": ({"k": 0}, torch.float32, "without rows or columns"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(launcher: Fake, name: str) -> None:
    sizes, dtype, reason = DECLINED[name]
    given = to(operands(**sizes), dtype)
    assert reason in str(gpu.refusal(arguments(*given.values())))
    assert moe_ffn(**given).shape == given["x"].shape
    assert not launcher.given


def test_a_matrix_beyond_32_bits(launcher: Fake) -> None:
    given = to(operands(), torch.float32)
    wide = {n: torch.empty(x.shape, device="meta") for n, x in given.items() if isinstance(x, Tensor)}
    wide["indices"] = wide["indices"].long()
    wide["gate_up"] = torch.empty_strided(given["gate_up"].shape, (1, 2**28, 1), device="meta")
    assert "at most" in str(gpu.refusal(arguments(*wide.values())))


def test_the_reason_is_said_once(launcher: Fake, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu.LAUNCHER, "missing", lambda _: "Triton is asleep")
    given = to(operands(), torch.float32)
    with caplog.at_level(logging.WARNING, "gatecc"):
        moe_ffn(**given)
        moe_ffn(**given)
    assert [record.message for record in caplog.records] == [
        "experts run in ATen and not by a GPU kernel: Triton is asleep"
    ]
    assert not launcher.given
