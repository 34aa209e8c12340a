"""Which problems the GPU kernels take, and what is said of the others."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from gatecc.codegen.notice import say_once
from gatecc.ops.linear_attention import linear_attention
from gatecc.ops.linear_attention.arguments import arguments
from gatecc.ops.linear_attention.kernels import KERNELS
from gatecc.ops.linear_attention.problem import Problem, prepare
from gatecc.ops.linear_attention.triton import dispatch as gpu
from tests.ops.linear_attention.cases import RULES, operands


class Fake:
    """The launcher, without Triton: it remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Problem] = []

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        self.given.append(problem)
        return problem.v.new_zeros(*problem.q.shape[:3], problem.v.size(3)), problem.new_state().zero_()


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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_taken(launcher: Fake, rule: str, dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) for name, x in operands(rule, H=4, N=5, Dk=7, k=1).items()}
    linear_attention(**given, reverse=True)
    assert len(launcher.given) == 1
    assert launcher.given[0].reverse


def test_logits_are_left_to_the_kernel(launcher: Fake) -> None:
    given = operands("gated", N=5)
    linear_attention(**given, gate_normalizer=16.0)
    (problem,) = launcher.given
    assert problem.normalizer == 16
    assert problem.log_decay is not None
    assert torch.equal(problem.log_decay, given["log_decay"])


DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "torch.float64 has no kernel"),
    "wide": ({"rule": "delta", "Dk": 257}, "a delta rule with 257 key channels has no kernel"),
    "empty": ({"Dv": 0}, "heads without channels"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(launcher: Fake, name: str) -> None:
    options, reason = DECLINED[name]
    sizes: dict[str, Any] = {"rule": "gated", "N": 2, **options}
    dtype = sizes.pop("dtype", torch.float32)
    given = {key: x.to(dtype) for key, x in operands(**sizes).items()}
    assert reason in str(gpu.refusal(prepare(arguments(**given))))
    o, _ = linear_attention(**given)
    assert o.shape == given["v"].shape
    assert not launcher.given


def test_the_reason_is_said_once(launcher: Fake, caplog: pytest.LogCaptureFixture) -> None:
    given = operands("delta", N=2, Dk=257)
    with caplog.at_level(logging.WARNING, "gatecc"):
        linear_attention(**given)
        linear_attention(**given)
    assert [record.message for record in caplog.records] == [
        "linear attention runs in ATen and not by a GPU kernel: "
        "a delta rule with 257 key channels has no kernel (256 at most)"
    ]
    assert not launcher.given
