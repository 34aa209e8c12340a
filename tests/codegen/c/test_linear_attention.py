"""The generated C kernels against the recurrence in float64: values, gradients, layouts, threads, denormals."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given as example
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.codegen.c.linear_attention import CpuKernels, Spec, library
from gatecc.ops.linear_attention import linear_attention, linear_attention_step
from gatecc.ops.linear_attention.kernels import KERNELS
from tests.ops.linear_attention.cases import RULES, double, leaves, operands, relative

HARD = ("mild", "-3", "-12", "mixed", "zero", "one")


@pytest.fixture
def threads() -> Iterator[None]:
    """Eight threads, more than heads."""
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(1)


def both(inputs: dict[str, Any], **options: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, value and truth of both outputs and of every gradient."""
    sizes = inputs["q"].shape[:3]
    weights = torch.randn(*sizes, inputs["v"].size(3))
    runs: list[dict[str, Tensor]] = []
    for values in (leaves(inputs), leaves(double(inputs))):
        o, state = linear_attention(**values, **options)
        wanted = {name: x for name, x in values.items() if isinstance(x, Tensor) and x.requires_grad}
        loss = (o * weights.to(o.dtype)).sum() + state.square().sum()
        grads = torch.autograd.grad(loss, list(wanted.values()))
        runs.append({"o": o.detach(), "state": state.detach(), **dict(zip(wanted, grads, strict=True))})
    found, truth = runs
    yield from ((name, found[name], truth[name]) for name in found)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", HARD)
def test_hard_decays(rule: str, kind: str) -> None:
    if "gated" not in rule and kind != "mild":
        return  # nothing decays: one kind says it all
    for N in (1, 63, 64, 65, 130):
        for name, found, truth in both(operands(rule, N=N, kind=kind)):
            assert relative(found, truth) < (1e-5 if name in ("o", "state") else 1e-4), (name, N)


def test_a_thousand_tokens_of_every_decay() -> None:
    for kind in HARD:
        inputs = operands("gated", N=1000, Dk=64, Dv=64, kind=kind)
        assert relative(linear_attention(**inputs)[0], linear_attention(**double(inputs))[0]) < 1e-5


@settings(max_examples=12)
@example(
    rule=st.sampled_from(RULES),
    sizes=st.sampled_from([(16, 16), (5, 33)]),
    N=st.integers(0, 70),
    heads=st.fixed_dictionaries({name: st.sampled_from([1, 2, 4]) for name in ("k", "v", "log_decay", "beta")}),
    reverse=st.booleans(),
    per_head=st.booleans(),
    layout=st.sampled_from(["plain", "tokens first", "channels apart"]),
    cuts=st.sampled_from([None, [0.0, 0.3, 0.3, 1.0], [0.0, 1.0]]),
)
def test_any_layout(
    rule: str,
    sizes: tuple[int, int],
    N: int,
    heads: dict[str, int],
    reverse: bool,
    per_head: bool,
    layout: str,
    cuts: list[float] | None,
) -> None:
    inputs = operands(rule, H=4, N=N, Dk=sizes[0], Dv=sizes[1], kind="mild", **heads)
    if per_head and "log_decay" in inputs:
        inputs["log_decay"] = inputs["log_decay"][..., :1]
    for name, x in inputs.items():
        if layout == "tokens first":
            inputs[name] = x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "channels apart":
            inputs[name] = torch.stack([x, x], -1)[..., 0]
    inputs["initial_state"] = torch.randn(len(cuts) - 1 if cuts else 1, 4, *sizes)
    options: dict[str, Any] = {"reverse": reverse}
    if cuts:
        options["cu_seqlens"] = torch.tensor([int(c * N) for c in cuts])
    for name, found, truth in both(inputs, **options):
        assert found.shape == truth.shape
        assert relative(found, truth) < 1e-5, name


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_threads_along_the_sequence(rule: str, reverse: bool, packed: bool) -> None:
    N = 700
    inputs = operands(rule, H=2, N=N, k=1, kind="mixed")
    inputs["initial_state"] = torch.randn(1 + packed, 2, 16, 16)
    options = {"cu_seqlens": torch.tensor([0, 100, N])} if packed else {}
    for name, found, truth in both(inputs, reverse=reverse, **options):
        assert relative(found, truth) < 1e-5, name


def test_large_outputs_are_those_of_their_parts() -> None:
    """4 MB an output: huge pages, and gradients past the caches; half a megabyte is neither."""
    inputs = operands("gated", B=8, H=4, N=512, Dk=64, Dv=64)
    weight = torch.randn_like(inputs["v"])

    def results(*rows: Tensor) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in rows[1:]]
        o, state = linear_attention(*given)
        return [o.detach(), state.detach(), *torch.autograd.grad((o * rows[0]).sum(), given)]

    whole = results(weight, *inputs.values())
    parts = [results(*rows) for rows in zip(*(x.split(1) for x in (weight, *inputs.values())), strict=True)]
    for found, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(found, torch.cat(pieces))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in operands("gated_delta", N=70, Dk=5, Dv=33).items()}
    for name, found, truth in both(inputs):
        assert relative(found, truth) < (1e-5 if name == "state" else 2 * torch.finfo(dtype).eps), name


def test_float16_denormals_are_read() -> None:
    q = torch.full((1, 1, 1, 16), 3e-7, dtype=torch.float16)
    o, _ = linear_attention(q, torch.ones_like(q), torch.ones_like(q), scale=1000.0)
    torch.testing.assert_close(o, torch.full_like(o, float(q[0, 0, 0, 0]) * 16000), rtol=1e-3, atol=0)


def test_nan_and_infinity_are_not_hidden() -> None:
    inputs = operands("gated", N=8, Dk=16, Dv=16)
    inputs["log_decay"][0, 0, 3] = float("nan")
    o, _ = linear_attention(**inputs)
    assert o[0, 0, :3].isfinite().all()
    assert o[0, 0, 3:].isnan().all()
    assert o[0, 1].isfinite().all()


def test_denormals_outside_are_left_alone() -> None:
    tiny = torch.tensor(1e-40)
    linear_attention(**operands("gated"))
    assert float(tiny * 1.0) > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(16, 16), (5, 33)])
def test_steps(rule: str, sizes: tuple[int, int]) -> None:
    inputs = operands(rule, H=4, N=6, Dk=sizes[0], Dv=sizes[1], k=2, log_decay=1)
    o, final = linear_attention(**double(inputs))
    state = torch.zeros(1, 4, *sizes)
    names = ("q", "k", "v", "log_decay", "beta")
    for t in range(6):
        token: Any = [inputs[name][:, :, t] if name in inputs else None for name in names]
        assert relative(linear_attention_step(*token, state=state), o[:, :, t]) < 1e-5
    assert relative(state, final) < 1e-5


def test_the_kernel_serves() -> None:
    """Nothing above would notice if the ATen form had run."""
    assert isinstance(KERNELS["cpu"], CpuKernels)
    found = library(Spec("forward", True, False, 16, 16))
    assert isinstance(found, ctypes.CDLL)
    assert library(Spec("forward", True, False, 16, 16)) is found
