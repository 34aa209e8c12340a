"""Kernels printed from graphs: regions that nobody named, each judged or refused with a reason."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.codegen.judge.binaries import judge_launch, launches
from gatecc.codegen.judge.family import DTYPES
from gatecc.codegen.judge.interpreted import interpreting
from gatecc.codegen.judge.numbers import judge_numbers
from gatecc.codegen.regions import judged
from gatecc.codegen.regions.blocks import LAUNCH, MANY, Products, best
from gatecc.codegen.regions.build import build, load
from gatecc.codegen.regions.part import print_kernel
from gatecc.codegen.regions.region import RefusedError, region_of
from gatecc.errors import ArgumentError
from tests.codegen.regions.drawn import Drawn, drawn

# `GATECC_REGIONS=200 pytest tests/codegen/regions` judges that many and compiles each for two targets; 50:100 those
# from the 50th to the 100th, so that a long run can be cut into pieces.
FIRST, LAST = map(int, f"0:{os.environ.get('GATECC_REGIONS', '20')}".split(":")[-2:])
COMPILED_FOR = ("sm_90", "gfx942") if "GATECC_REGIONS" in os.environ else ()


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATECC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def judge(region: Drawn) -> list[str]:
    """What is wrong with a region's kernel. Raises RefusedError if it has none."""
    torch.manual_seed(0)
    built = build(region, [x.to(DTYPES[region.dtype]) for x in region.tensors()])

    def example(rows: int, **options: Any) -> list[Tensor]:
        return region.many(rows, **options) if options.get("device") else region.tensors()

    family = judged.family_of("drawn", built, region, example)
    faults = list(judge_numbers(family, "37 rows", region.dtype).faults)
    for target in COMPILED_FOR:
        for made in launches(family, "4096 rows", region.dtype, target):
            found = judge_launch(family, made, "4096 rows", region.dtype, target)
            faults += [f"{target}: {fault}" for fault in found.faults]
    if region.smooth and region.dtype == "fp32":
        of_gradient = judged.gradient_family("drawn", built, region, example)
        faults += [f"gradient: {fault}" for fault in judge_numbers(of_gradient, "37 rows", "fp32").faults]
    return faults


def test_drawn_regions_are_right_or_refused_and_most_have_a_kernel() -> None:
    wrong: dict[int, list[str]] = {}
    refused: dict[int, str] = {}
    for index, region in enumerate(drawn(FIRST, LAST), FIRST):
        try:
            faults = judge(region)
        except RefusedError as reason:
            refused[index] = str(reason)
            continue
        if faults:
            wrong[index] = [*faults, str(region)]
    assert wrong == {}
    assert all(refused.values())
    assert 4 * len(refused) < LAST - FIRST


def parts(tensors: Any) -> tuple[Tensor, ...]:
    return tensors if isinstance(tensors, tuple) else (tensors,)


def norm(x: Tensor, skip: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    y = x + skip
    return F.rms_norm(y, (y.size(-1),), scale), y


def gated(x: Tensor, w: Tensor, b: Tensor, o: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, w, b)) * o


CALLS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "norm": (norm, ((2, 7, 24), (2, 7, 24), (24,))),
    "gated": (gated, ((2, 7, 16), (24, 16), (24,), (2, 7, 24))),
    "rows alone": (lambda x, m: (x * m).sum(-1), ((3, 5, 24), (5, 24))),
    "norm before": (lambda x, w, s, b: F.linear(F.layer_norm(x, (24,), s, b), w), ((2, 7, 24), (20, 24), (24,), (24,))),
    "low rank": (
        lambda x, a, b, o: torch.sigmoid(F.silu(x @ a) @ b) * o,
        ((2, 7, 24), (24, 5), (5, 30), (2, 7, 30)),
    ),
    "two halves": (lambda x, w, u: F.silu(F.linear(x, w)) * F.linear(x, u), ((2, 7, 24), (30, 24), (30, 24))),
    "masked": (lambda x, m: torch.softmax((x * m).masked_fill(m > 1, -1e4), -1), ((2, 7, 24), (7, 24))),
}


def tensor(shape: tuple[int, ...], lead: int = 0) -> Tensor:
    """``lead``: how many there are of a first axis of three, if it is another number; matrices are small."""
    shape = (lead, *shape[1:]) if lead and len(shape) == 3 else shape
    return (torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1)).requires_grad_()


@pytest.mark.parametrize("name", CALLS)
def test_the_operator_and_its_gradient(name: str) -> None:
    """On a CPU: in ATen, also compiled and for other numbers of rows."""
    function, shapes = CALLS[name]
    given = [tensor(s) for s in shapes]
    operator = build(function, [x.detach() for x in given]).module.operator
    assert set(torch.library.opcheck(operator, tuple(given)).values()) == {"SUCCESS"}

    def gradients(call: Callable[..., Any], tensors: list[Tensor]) -> tuple[Tensor, ...]:
        loss = sum(((y - 0.5) ** 2).sum() for y in parts(call(*tensors)))
        assert isinstance(loss, Tensor)
        return torch.autograd.grad(loss, tensors)

    compiled = torch.compile(lambda *x: operator(*x), backend="aot_eager", fullgraph=True)
    more = [tensor(s, 6) for s in shapes]
    for call, tensors in ((operator, given), (compiled, given), (operator, more)):
        for found, wanted in zip(gradients(call, tensors), gradients(function, tensors), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_the_kernel_takes_other_numbers_of_rows(name: str) -> None:
    function, shapes = CALLS[name]
    built = build(function, [torch.randn(s) for s in shapes])
    given = [tensor(s, 6) for s in shapes]
    results = parts(function(*given))
    grads = [torch.randn_like(y) for y in results]
    assert built.gradient is not None
    with interpreting(built.module, built.gradient) as findings, torch.no_grad():
        found = built.module.launch(*given), built.gradient.launch(*given, *grads)
    for ours, wanted in zip(found, (results, torch.autograd.grad(results, given, grads)), strict=True):
        for x, y in zip(ours, wanted, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert (findings.outside, findings.raced) == ([], [])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (((2, 7, 24), (7, 24), (2, 1, 1)), ((3, 12, 24), (12, 24), (3, 1, 1))),
        (((2, 3, 7, 24), (3, 1, 24), (2, 1, 7, 1)), ((4, 5, 9, 24), (5, 1, 24), (4, 1, 9, 1))),
    ],
)
def test_every_leading_axis_may_be_longer(first: Any, second: Any) -> None:
    """Inputs that lack some of them are read by the sizes of the call."""
    built = build(lambda x, m, c: torch.sigmoid(x * m) + c, [torch.randn(s) for s in first])
    given = [torch.randn(s, requires_grad=True) for s in second]
    y = torch.sigmoid(given[0] * given[1]) + given[2]
    grad = torch.randn_like(y)
    assert built.gradient is not None
    with interpreting(built.module, built.gradient) as findings, torch.no_grad():
        found = *built.module.launch(*given), *built.gradient.launch(*given, grad)
    for ours, wanted in zip(found, (y, *torch.autograd.grad(y, given, grad)), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    assert (findings.outside, findings.raced) == ([], [])


def test_a_tensor_that_is_given_twice_is_two_inputs() -> None:
    x, y = torch.randn(5, 24), torch.randn(5, 24)
    module = build(lambda x, y: torch.sigmoid(x) * y, [x, x], gradient=False).module
    with interpreting(module):
        torch.testing.assert_close(module.launch(x, y)[0], torch.sigmoid(x) * y)


def test_gradients_of_weights_are_kernels_that_sum_over_parts_of_the_rows() -> None:
    """Many rows are cut into parts, each with a program of its own; no result is left to ATen but views."""

    def function(x: Tensor, w: Tensor, s: Tensor, o: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(F.rms_norm(x, (24,), s), w)) * o

    given = [torch.randn(s, requires_grad=True) for s in ((1000, 24), (20, 24), (24,), (1000, 20))]
    built = build(function, [x.detach()[:9] if len(x) == 1000 else x.detach() for x in given])
    assert built.gradient is not None
    text = Path(str(built.gradient.__file__)).read_text().split("def launch(")[1].split("return")[0]
    left = {line.split("torch.ops.aten.")[1].split(".")[0] for line in text.splitlines() if "torch.ops.aten" in line}
    assert left <= {"view", "permute", "_to_copy"}
    grad = torch.randn(1000, 20)
    with interpreting(built.gradient) as findings, torch.no_grad():
        found = built.gradient.launch(*given, grad)
    exact = torch.autograd.grad(function(*(doubles := [x.double() for x in given])), doubles, grad.double())
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, atol=1e-5, rtol=1e-5)
    assert (findings.outside, findings.raced) == ([], [])


def test_a_gradient_of_one_number_is_judged_by_the_terms_of_its_sum() -> None:
    def function(x: Tensor, s: Tensor) -> Tensor:
        return torch.tanh(x) * s

    def example(rows: int, **options: Any) -> list[Tensor]:
        return [torch.randn(rows, 24, **options), torch.randn(1, **options)]

    built = build(function, example(37))
    family = judged.gradient_family("one number", built, function, example)
    torch.manual_seed(0)
    x, _, grad = (given := family.cases["37 rows"]()).values()
    terms = x.tanh() * grad
    (found,) = (cancelled := family.cancelled(given)).values()
    assert list(cancelled) == ["y1"]
    assert found == pytest.approx(float(terms.abs().sum() / terms.sum().abs()))
    assert judge_numbers(family, "37 rows", "fp32").faults == ()

    def off(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: y * (1 + 4 * torch.finfo().eps * found) for name, y in family.run(given).items()}

    assert any("y1 errs" in fault for fault in judge_numbers(replace(family, run=off), "37 rows", "fp32").faults)


def test_sums_over_rows_are_priced_in_parts() -> None:
    """A weight's gradient of few columns keeps a GPU busy if its rows are cut; its parts are added up behind."""
    whole = Products(64, MANY, 1, 1, torch.bfloat16, whole=False)
    one, parts = (best("nvidia", 64, replace(whole, split=split))[0][0] for split in (False, True))
    assert LAUNCH < parts < one / 2


def test_what_two_kernels_do_sooner_is_refused() -> None:
    """A norm in front of a product, a gate of low rank: one kernel for few rows, two for many, by the model."""

    def normed(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (1024,)) @ w

    def gate(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.sigmoid(x @ a @ b)

    for function, weights, word in (
        (normed, ((1024, 4096),), "what is before it"),
        (gate, ((1024, 16), (16, 4096)), "a product that it reads"),
    ):
        for rows, refused in ((16, False), (4096, True)):
            given = [torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((rows, 1024), *weights)]
            region = region_of(function, given)
            assert (word in str(print_kernel(region).slower)) is refused
            if refused:
                with pytest.raises(RefusedError, match=word):
                    build(function, given, slower=False)


def test_functions_that_triton_lacks_hold_at_every_size() -> None:
    def several(x: Tensor) -> tuple[Tensor, ...]:
        return x.sin(), x.cos(), x.tanh(), x.abs().log1p(), x.clamp_max(1.0).expm1()

    module = build(several, [torch.randn(4, 32)], gradient=False).module
    for scale in (1e-3, 1.0, 1e3, 1e5, 1e20, 1e38):
        x = (torch.randn(4, 32) * scale).clamp(-3e38, 3e38)
        with interpreting(module):
            found = module.launch(x)
        for ours, exact in zip(found, several(x.double()), strict=True):
            torch.testing.assert_close(ours.double(), exact, atol=2e-7, rtol=2e-7)
    with interpreting(module):
        sines = module.launch(torch.tensor([[0.0, torch.inf, -torch.inf, torch.nan] * 8] * 4))[0]
    assert sines[0, :4].isnan().tolist() == [False, True, True, True]


REFUSED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], str]] = {
    "over rows": (lambda x: x.sum(0), ((4, 8),), "over other axes"),
    "prefix sum": (lambda x: x.cumsum(-1), ((4, 8),), "cumsum is not in the table"),
    "heads": (lambda x: x.unflatten(-1, (2, 4)).relu(), ((3, 4, 8),), "changes axes"),
    "wide middle": (lambda x, w, u: (x @ w).relu() @ u, ((4, 8), (8, 900), (900, 800)), "anew for each of 7 blocks"),
    "three products": (
        lambda x, w, u, v: (x @ w).relu() @ u @ v,
        ((4, 8), (8, 8), (8, 8), (8, 8)),
        "three products that follow",
    ),
    "read twice": (lambda x, w, u: (y := x @ w, y @ u), ((4, 8), (8, 8), (8, 8)), "by another product and by a result"),
    "other shapes": (lambda x, w, u: (x @ w, x @ u), ((4, 8), (8, 8), (8, 6)), "different shapes"),
    "computed weight": (lambda x, w: x @ w.sigmoid(), ((4, 8), (8, 8)), "right operand is computed"),
    "wide rows": (lambda x: x.softmax(-1), ((2, 20000),), "20000 columns are reduced"),
    "one row": (lambda x: x.sigmoid(), ((1, 8),), "several rows"),
    "an input": (lambda x: (x, x.sigmoid()), ((4, 8),), "a result that is an input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused(name: str) -> None:
    function, shapes, word = REFUSED[name]
    with pytest.raises(RefusedError, match=word):
        build(function, [torch.randn(s) for s in shapes])


def test_other_types_are_refused() -> None:
    for dtype in (torch.float64, torch.int64):
        with pytest.raises(RefusedError, match=str(dtype)):
            build(lambda x: x * 2, [torch.ones(4, 8, dtype=dtype)])


def test_files_are_kept_by_what_they_compute() -> None:
    def once(scale: float, note: str) -> Path:
        built = build(lambda x: torch.sigmoid(scale * x), [torch.randn(4, 8)], [note])
        return Path(str(built.module.__file__))

    one = once(2.0, "layers.3.mlp (model.py:17), made by gate")
    assert one == once(2.0, "layers.3.mlp (model.py:17), made by gate")
    assert one != once(3.0, "layers.3.mlp (model.py:17), made by gate")
    text = one.read_text()
    assert "layers.3.mlp (model.py:17), made by gate" in text
    assert text.count("tl.store") == 1
    assert all(len(line) < 200 for line in text.splitlines())
    with pytest.raises(ArgumentError, match="no file"):
        load("region_of_nothing")


@pytest.mark.parametrize(("name", "target"), [("gated output", "sm_80"), ("residual and norm", "gfx942")])
def test_samples_hold_their_budgets(name: str, target: str) -> None:
    sample = judged.SAMPLES[name]
    built = build(sample.function, sample.tensors(37, dtype=torch.bfloat16))
    family = judged.family_of(name, built, sample.function, sample.tensors)
    (made,) = launches(family, "4096 rows", "bf16", target)
    assert judge_launch(family, made, "4096 rows", "bf16", target).faults == ()
