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

from gatecc.ops.linear_attention import linear_attention, linear_attention_step
from gatecc.ops.linear_attention.c import kernels as kernels_in_c
from gatecc.ops.linear_attention.c.kernels import CpuKernels, Spec, has_matrix_units, library
from gatecc.ops.linear_attention.kernels import KERNELS
from gatecc.ops.linear_attention.registration import bound
from tests.ops.linear_attention.cases import RULES, double, leaves, operands, relative, tokens_first

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


# Without a gate nothing decays: one kind says it all.
@pytest.mark.parametrize(("rule", "kind"), [(r, k) for k in HARD for r in RULES if "gated" in r or k == "mild"])
def test_hard_decays(rule: str, kind: str) -> None:
    for N in (1, 63, 64, 65, 130):
        for name, found, truth in both(operands(rule, N=N, kind=kind)):
            assert relative(found, truth) < (1e-5 if name in ("o", "state") else 1e-4), (name, N)


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
@pytest.mark.parametrize("normalizer", [0.5, 1.0, 16.0])
def test_logits(rule: str, normalizer: float) -> None:
    """Activated where they are read, however strong, in every dtype, per channel and per head."""
    for N, dtype, width in (
        (1, torch.float32, 5),
        (70, torch.float32, 5),
        (70, torch.bfloat16, 5),
        (9, torch.float16, 1),
    ):
        inputs = operands(rule, N=N, Dk=5, Dv=33, log_decay=1)
        logits = torch.randn(1, 1, N, width) * 12
        logits[:, :, N // 2] = -torch.inf
        logits[:, :, N // 3, 0] = torch.inf
        inputs["log_decay"] = logits.to(dtype)
        for name, found, truth in both(inputs, gate_normalizer=normalizer):
            rounding = torch.finfo(dtype).eps / 2 if name == "log_decay" else 0
            assert relative(found, truth) < 2e-6 + rounding, (name, N, dtype)


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
    normalizer=st.sampled_from([None, 2.0]),
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
    normalizer: float | None,
) -> None:
    inputs = operands(rule, H=4, N=N, Dk=sizes[0], Dv=sizes[1], kind="mild", **heads)
    if per_head and "log_decay" in inputs:
        inputs["log_decay"] = inputs["log_decay"][..., :1]
    for name, x in inputs.items():
        if layout == "channels apart":
            inputs[name] = torch.stack([x, x], -1)[..., 0]
    inputs = tokens_first(inputs) if layout == "tokens first" else inputs
    inputs["initial_state"] = torch.randn(len(cuts) - 1 if cuts else 1, 4, *sizes)
    options: dict[str, Any] = {"reverse": reverse}
    if "log_decay" in inputs:
        options["gate_normalizer"] = normalizer
    if cuts:
        options["cu_seqlens"] = torch.tensor([int(c * N) for c in cuts])
    for name, found, truth in both(inputs, **options):
        assert found.shape == truth.shape
        assert relative(found, truth) < 1e-5, name
        if layout == "tokens first" and name in ("o", "q", "k", "v", "log_decay"):
            assert found.transpose(1, 2).is_contiguous(), name


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_threads_along_the_sequence(rule: str, reverse: bool, packed: bool) -> None:
    N = 700
    inputs = operands(rule, H=2, N=N, k=1, kind="mixed")
    inputs["initial_state"] = torch.randn(1 + packed, 2, 16, 16)
    options: dict[str, Any] = {"cu_seqlens": torch.tensor([0, 100, N])} if packed else {}
    if rule == "gated" and reverse:
        options["gate_normalizer"] = 2.0
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
    joined = results(*tokens_first({"weight": weight, **inputs}).values())
    for found, other, *pieces in zip(whole, joined, *parts, strict=True):
        assert torch.equal(found, torch.cat(pieces))
        assert torch.equal(found, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    inputs = {name: x.to(dtype) for name, x in operands("gated_delta", N=70, Dk=5, Dv=33).items()}
    for name, found, truth in both(inputs):
        assert relative(found, truth) < (1e-5 if name == "state" else 2 * torch.finfo(dtype).eps), name


needs_matrix_units = pytest.mark.skipif(not has_matrix_units(), reason="not run: this CPU has no matrix units (AMX)")


def rms(found: Tensor, truth: Tensor) -> float:
    """Root mean square of the error, relative to that of the truth. NaN counts as infinite."""
    error = (found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    return float(error.nan_to_num(torch.inf))


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which parts of the kernels were asked for."""
    asked: list[str] = []

    def spy(spec: Spec) -> ctypes.CDLL | None:
        asked.append(spec.part)
        return library(spec)

    monkeypatch.setattr(kernels_in_c, "library", spy)
    return asked


def rounded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same in bfloat16."""
    return {name: x.bfloat16() for name, x in inputs.items()}


@needs_matrix_units
@pytest.mark.parametrize("kind", [*HARD, None])
@pytest.mark.parametrize("sizes", [(64, 64), (40, 17)])
def test_matrix_units(kind: str | None, sizes: tuple[int, int], parts: list[str]) -> None:
    """bfloat16 rounds inputs and outputs to 1.7e-3; its products twice as much, as on every such unit."""
    for N, reverse, Hk in ((32, False, 2), (33, True, 1), (130, False, 1)):
        given = operands("gated" if kind else "linear", B=2, N=N, Dk=sizes[0], Dv=sizes[1], kind=kind or "", k=Hk, v=Hk)
        inputs = rounded(given)
        inputs["initial_state"] = torch.randn(2, 2, *sizes)
        found, truth = (linear_attention(**x, reverse=reverse) for x in (inputs, double(inputs)))
        assert rms(found[0], truth[0]) < 5e-3, N
        assert rms(found[1], truth[1]) < 5e-3, N
    assert set(parts) == {"tiles"}


@needs_matrix_units
@pytest.mark.parametrize("strong", [-torch.inf, -40.0, float("nan")])
def test_matrix_units_around_a_strong_gate(strong: float) -> None:
    """Chunks with mild gates divide by them, others do not: a sequence may go from one to the other and back."""
    inputs = rounded(operands("gated", N=600, Dk=32, Dv=32))
    inputs["log_decay"][:, 0, 70:72] = strong
    (found, state), (truth, last) = (linear_attention(**x) for x in (inputs, double(inputs)))
    spoilt = truth.isnan()
    assert torch.equal(found.isnan(), spoilt)
    assert torch.equal(state.isnan(), last.isnan())
    assert rms(found[~spoilt], truth[~spoilt]) < 5e-3
    assert rms(state[~last.isnan()], last[~last.isnan()]) < 5e-3


@needs_matrix_units
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), torch.inf])
def test_matrix_units_spoil_no_earlier_token(name: str, value: float) -> None:
    inputs = rounded(operands("gated", N=100))
    clean = linear_attention(**inputs)[0]
    inputs[name][0, 0, 40, 3] = value
    found = linear_attention(**inputs)[0]
    assert rms(found[:, :, :40], clean[:, :, :40].double()) < 5e-3
    assert torch.equal(found[:, 1], clean[:, 1])
    assert not found[0, 0, 40].isfinite().all()


@needs_matrix_units
@settings(max_examples=8)
@example(
    gates=st.sampled_from([None, "float32", "a head", "channels apart", "logits"]),
    threads=st.sampled_from([1, 8]),
    cuts=st.sampled_from([None, [0, 40, 40, 700], [0, 700]]),
    tokens_first=st.booleans(),
)
def test_matrix_units_take_any_layout(
    gates: str | None, threads: int, cuts: list[int] | None, tokens_first: bool
) -> None:
    inputs = rounded(operands("gated", N=700, Dk=32, Dv=48))
    g = inputs["log_decay"]
    if tokens_first:
        inputs = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    if gates is not None:
        twice = torch.stack([g, g], -1)[..., 0]
        given = {"float32": g.float(), "a head": g[..., :1], "channels apart": twice, "logits": g * 32}
        inputs["log_decay"] = given[gates]
    options: dict[str, Any] = {"cu_seqlens": torch.tensor(cuts)} if cuts else {}
    if gates == "logits":
        options["gate_normalizer"] = 16.0
    torch.set_num_threads(threads)
    try:
        found, state = linear_attention(**inputs, **options)
    finally:
        torch.set_num_threads(1)
    truth, last = linear_attention(**double(inputs), **options)
    assert rms(found, truth) < 5e-3
    assert rms(state, last) < 5e-3


@needs_matrix_units
def test_matrix_units_are_left_as_they_were() -> None:
    """Other libraries keep the shapes of tiles per thread, too."""
    a = torch.randn(64, 64).bfloat16()
    before = a @ a
    linear_attention(**rounded(operands("gated", N=64)))
    assert torch.equal(a @ a, before)


@needs_matrix_units
def test_what_does_not_suit_matrix_units(parts: list[str]) -> None:
    """Steps, short sequences, delta rules, wider numbers and channels that lie apart."""
    half = rounded(operands("gated", N=40))
    apart: dict[str, Any] = {**half, "k": torch.stack([half["k"], half["k"]], -1)[..., 0]}
    delta = rounded(operands("delta", N=40))
    short: dict[str, Any] = {name: x[:, :, :31] for name, x in half.items()}
    for inputs in (apart, delta, short, operands("gated", N=40)):
        linear_attention(**inputs)
    assert set(parts) == {"forward"}


def test_without_the_right_to_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems may refuse them, and compilers may not know them: the vector units serve."""
    inputs = rounded(operands("gated", N=40))
    monkeypatch.setattr(kernels_in_c, "has_matrix_units", lambda: True)

    def refused(spec: Spec) -> ctypes.CDLL | None:
        return None if spec.part == "tiles" else library(spec)

    monkeypatch.setattr(kernels_in_c, "library", refused)
    found, truth = linear_attention(**inputs), linear_attention(**double(inputs))
    assert relative(found[0], truth[0]) < 2 * torch.finfo(torch.bfloat16).eps
    assert relative(found[1], truth[1]) < 1e-5


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


def test_a_step_reads_grouped_heads_as_they_are() -> None:
    inputs = operands("gated_delta", H=4, N=1, k=2, v=1, log_decay=2, beta=1)
    token = [inputs[name][:, :, 0] for name in ("q", "k", "v", "log_decay", "beta")]
    step, state = CpuKernels().step, torch.zeros(1, 4, 16, 16)
    assert step(*token, state=state, after=state, scale=1.0) is not None
    token[1] = token[1][:, :, :15]
    assert step(*token, state=state, after=state, scale=1.0) is None


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_a_bound_step_looks_again_where_calls_differ(rule: str) -> None:
    """One place in a program, with other batches, layouts and dtypes from call to call."""
    step = bound()
    for B, layout in ((1, "plain"), (2, "plain"), (2, "strided"), (2, "plain"), (1, "half"), (1, "plain")):
        given = operands(rule, B=B, H=4, N=1, k=2, v=2, log_decay=4, beta=1)
        state = torch.randn(B, 4, 16, 16)
        held = state.clone()
        if layout == "strided":
            given["k"] = torch.stack([given["k"], given["k"]], -1)[..., 0]
        if layout == "half":
            given = {name: x.bfloat16() for name, x in given.items()}
        single = [given.get(name) for name in ("q", "k", "v", "log_decay", "beta")]
        for normalizer in (None, 2.0):
            o, after = step(*single, state, gate_normalizer=normalizer)
            truth, final = linear_attention(**double(given), initial_state=state.double(), gate_normalizer=normalizer)
            assert torch.equal(state, held)
            assert o.dtype == given["q"].dtype
            assert relative(o, truth) < (1e-2 if layout == "half" else 1e-5), (B, layout)
            assert relative(after, final) < 1e-5


def test_the_kernel_serves() -> None:
    """Nothing above would notice if the ATen form had run."""
    assert isinstance(KERNELS["cpu"], CpuKernels)
    found = library(Spec("forward", True, False, 16, 16))
    assert isinstance(found, ctypes.CDLL)
    assert library(Spec("forward", True, False, 16, 16)) is found
