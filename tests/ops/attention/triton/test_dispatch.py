"""Which calls of attention the GPU kernels take, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gatecc.ops.attention import attention
from gatecc.ops.attention.arguments import Arguments, arguments
from gatecc.ops.attention.kernels import KERNELS
from gatecc.ops.attention.triton import dispatch as gpu
from tests.ops.attention.cases import operands, to


class Fake:
    """The launcher, without Triton: it remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Arguments] = []

    def forward(self, a: Arguments) -> Any:
        self.given.append(a)
        return a.new_output(), a.new_logsumexp()


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """CPU tensors go to the GPU's kernels, which are fakes."""
    fake = Fake()
    monkeypatch.setitem(KERNELS, "cpu", gpu.GpuKernels())
    monkeypatch.setattr(gpu.LAUNCHER, "module", lambda: fake)
    monkeypatch.setattr(gpu.LAUNCHER, "missing", lambda _: None)
    return fake


def test_the_kernels_serve_gpus() -> None:
    assert isinstance(KERNELS["cuda"], gpu.GpuKernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_taken(launcher: Fake, dtype: torch.dtype) -> None:
    attention(**to(operands(seen=(2, 1, 1, 6), gate=1, sinks=True, causal=True, window=3, softcap=2.0), dtype))
    assert [a.q.dtype for a in launcher.given] == [dtype]


MAP = torch.ones(1, 1, 2, 2, dtype=torch.bool)
DECLINED: dict[str, tuple[dict[str, Any], torch.dtype, str]] = {
    "float64": ({}, torch.float64, "torch.float64 has no kernel"),
    "no queries": ({"N": 0, "S": 3}, torch.float32, "without queries"),
    "wide heads": ({"D": 257}, torch.float32, "257 channels"),
    "odd blocks": ({"blocks": (1, 1, 2, 2), "block_sizes": (3, 3)}, torch.float32, "blocks of 3 queries"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(launcher: Fake, name: str) -> None:
    sizes, dtype, reason = DECLINED[name]
    given = to(operands(**sizes), dtype)
    assert reason in str(gpu.refusal(arguments(**given)))
    assert attention(**given)[0].shape == given["q"].shape
    assert not launcher.given


def test_other_dtypes_and_long_heads(launcher: Fake) -> None:
    given = to(operands(gate=5), torch.float32)
    assert "gate of torch.float64" in str(gpu.refusal(arguments(**{**given, "gate": given["gate"].double()})))
    far = torch.empty_strided((2, 4, 6, 5), (1, 1, 2**29, 1), device="meta")
    assert "spans" in str(gpu.refusal(arguments(far, far, far)))
