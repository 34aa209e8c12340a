"""The operator's schema, fake kernel, autograd and options, against its definition query by query in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from gatecc.errors import ArgumentError
from gatecc.ops import registry
from gatecc.ops.attention import attention, cost
from tests.ops.attention.cases import CASES, by_hand, leaves, operands, to, wanted


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", CASES)
def test_the_definition_and_its_gradients(name: str) -> None:
    given = leaves(operands(**CASES[name]))
    found, expected = attention(**given), by_hand(**given)
    torch.testing.assert_close(found, expected)
    sees = expected[1] > -torch.inf  # where nothing is seen the definition has no gradient
    grads = torch.randn_like(found[0]), torch.where(sees, torch.randn_like(found[1]), 0.0)
    mine = torch.autograd.grad(found, wanted(given), grads, retain_graph=True)
    seen = [torch.where(sees[..., None], expected[0], 0.0), torch.where(sees, expected[1], 0.0)]
    theirs = torch.autograd.grad(seen, wanted(given), grads, retain_graph=True)
    torch.testing.assert_close(mine, tuple(torch.nan_to_num(g) for g in theirs))
    alone = torch.autograd.grad(found[0], wanted(given), grads[0], allow_unused=True, retain_graph=True)
    zeros = torch.autograd.grad(found, wanted(given), (grads[0], torch.zeros_like(found[1])))
    torch.testing.assert_close(alone, zeros)


def test_a_query_that_sees_nothing() -> None:
    given = leaves(operands(seen=(2, 4, 6, 6)))
    given["bias"][0, 0, 3] = False
    out, logsumexp = attention(**given)
    assert not out[0, 0, 3].any()
    assert logsumexp[0, 0, 3] == -torch.inf
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), wanted(given)))


@pytest.mark.parametrize("frozen", ["q", "v", "gate", "bias", "sinks"])
def test_a_gradient_less(frozen: str) -> None:
    given = leaves(operands(gate=5, bias=(1, 1, 6, 6), sinks=True))
    given[frozen].requires_grad_(False)
    found, expected = (torch.autograd.grad(f(**given)[0].square().sum(), wanted(given)) for f in (attention, by_hand))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["causal", "everything"])
def test_every_other_derivative(name: str) -> None:
    small: dict[str, Any] = {"B": 1, "H": 2, "N": 2, "D": 2} | CASES[name] | {"G": 1}
    given = leaves(operands(**{n: v for n, v in small.items() if n not in ("hidden",)}))
    fixed = {n: v for n, v in given.items() if not (isinstance(v, Tensor) and v.requires_grad)}
    names = [n for n in given if n not in fixed]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        varied: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return attention(**fixed, **varied)

    assert torch.autograd.gradcheck(call, wanted(given), check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, wanted(given), fast_mode=True)


def test_vmap_over_samples() -> None:
    several = [operands(**CASES["sinks"]) for _ in range(3)]
    stacked = {n: torch.stack([x[n] for x in several]) for n, v in several[0].items() if isinstance(v, Tensor)}
    options = {n: v for n, v in several[0].items() if n not in stacked and v is not None}
    found = torch.func.vmap(lambda given: attention(**given, **options)[0])(stacked)
    torch.testing.assert_close(found, torch.stack([by_hand(**x)[0] for x in several]))


@pytest.mark.parametrize("name", ["causal", "everything", "padding", "blocks"])
def test_registration(name: str) -> None:
    given = leaves(to(operands(**CASES[name]), torch.float32))
    tensors = [v for n, v in given.items() if n in ("q", "k", "v", "gate", "bias", "sinks")]
    options = {n: v for n, v in given.items() if n not in ("q", "k", "v", "gate", "bias", "sinks")}
    torch.library.opcheck(torch.ops.gatecc.attention.default, tuple(tensors), options)


@pytest.mark.parametrize("sizes", [{"N": 0, "S": 3}, {"N": 3, "S": 1, "causal": True}, {"B": 0}, {"E": 1, "D": 1}])
def test_small_sizes(sizes: dict[str, Any]) -> None:
    given = leaves(operands(**sizes))
    out, logsumexp = attention(**given)
    N, S = sizes.get("N", 6), sizes.get("S", 6)
    assert out.shape == (sizes.get("B", 2), 4, N, sizes.get("E", 5))
    if out.numel():
        torch.testing.assert_close((out, logsumexp), by_hand(**given))
    assert [g.shape for g in torch.autograd.grad(out.sum(), wanted(given))] == [x.shape for x in wanted(given)]
    assert N >= S or logsumexp.numel() == 0 or logsumexp.isfinite().all()


def test_autocast_and_narrow_dtypes() -> None:
    given = to(operands(causal=True, gate=1, gate_activation="sigmoid"), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, logsumexp = attention(**given)
    assert (out.dtype, logsumexp.dtype) == (torch.bfloat16, torch.float32)
    narrow = {n: v.bfloat16() if n in ("q", "k", "v") else v for n, v in given.items()}
    torch.testing.assert_close((out, logsumexp), attention(**narrow), rtol=0, atol=0)
    exact = attention(**to(narrow, torch.float64))
    torch.testing.assert_close(out.double(), exact[0], rtol=2e-2, atol=2e-2)


def test_it_is_torchs_fused_attention() -> None:
    given = operands(N=33, D=8, G=2)
    expected = scaled_dot_product_attention(given["q"], given["k"], given["v"], is_causal=True, enable_gqa=True)
    found = attention(**given, causal=True)[0]
    torch.testing.assert_close(found, expected)
    assert found.transpose(1, 2).is_contiguous()


def test_flops() -> None:
    given = operands(N=6, S=9)
    forms: tuple[dict[str, Any], ...] = ({}, {"causal": True}, {"causal": True, "window": 4}, {"window": 3})
    for options in forms:
        mask = attention(**{**given, "v": torch.ones_like(given["v"])}, **options)[1]  # of the right shape
        ahead = torch.arange(9) - torch.arange(3, 9)[:, None]
        seen = (ahead <= 0) if options.get("causal") else torch.ones_like(ahead, dtype=torch.bool)
        if w := options.get("window"):
            seen &= (ahead > -w) & (ahead < w)
        assert cost.pairs(6, 9, **options) == seen.sum()
        with FlopCounterMode(display=False) as counter:
            attention(**given, **options)
        assert counter.get_total_flops() == 2 * mask.size(0) * 4 * int(seen.sum()) * 10
    entry = registry.find(torch.ops.gatecc.attention.default)
    assert entry is not None
    assert entry.bytes is not None
    assert entry.bytes(given["q"], given["k"], given["v"]) == 8 * (240 + 360 + 360 + 240) + 4 * 48


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": torch.zeros(2, 6, 5)}, "four axes"),
        ({"k": torch.zeros(2, 3, 6, 5)}, "do not fit"),
        ({"v": torch.zeros(2, 4, 7, 5)}, "do not fit"),
        ({"gate": torch.zeros(2, 4, 6, 2)}, "gate"),
        ({"bias": torch.zeros(2, 2, 6, 6)}, "bias"),
        ({"bias": torch.zeros(2, 1, 6, 6, dtype=torch.int64)}, "bias"),
        ({"sinks": torch.zeros(3)}, "sink"),
        ({"q": torch.zeros(2, 4, 6, 5, dtype=torch.float16)}, "dtype"),
        ({"window": 0}, "window"),
        ({"softcap": 0.0}, "capped"),
        ({"gate_activation": "relu"}, "activation"),
        ({"blocks": torch.ones(1, 1, 3, 2, dtype=torch.bool), "block_sizes": (2, 2)}, "map of blocks"),
        ({"blocks": torch.ones(1, 2, 3, 3, dtype=torch.bool), "block_sizes": (2, 2)}, "map of blocks"),
        ({"blocks": torch.ones(1, 1, 3, 3), "block_sizes": (2, 2)}, "map of blocks"),
        ({"block_sizes": (2,)}, "so many queries"),
    ],
)
def test_refusals(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        attention(**{**operands(), **wrong})
