"""The operator's schema, fake kernel, autograd and options, against the recurrence written out in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import bidirectional, linear_attention
from tests.ops.linear_attention.cases import RULES, double, leaves, operands, relative, tokens_first


def by_hand(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """One head, q: (N, Dk), of the definition in the docstring, with matrices."""
    state = q.new_zeros(k.size(1), v.size(1))
    out: list[Tensor] = []
    for t in range(q.size(0)):
        state = state if log_decay is None else torch.diag(log_decay[t].exp()) @ state
        u = v[t] if beta is None else beta[t] * (v[t] - state.T @ k[t])
        state = state + torch.outer(k[t], u)
        out.append(state.T @ q[t] * q.size(1) ** -0.5)
    return torch.stack(out), state


@pytest.mark.parametrize("rule", RULES)
def test_the_definition(rule: str) -> None:
    given = double(operands(rule, B=2, H=4, N=5, Dk=3, Dv=6, k=2, v=1))
    o, state = linear_attention(**given)
    for b in range(2):
        for h in range(4):
            head = (given["q"][b, h], given["k"][b, h // 2], given["v"][b, 0])
            g, strength = (given[name][b, h] if name in given else None for name in ("log_decay", "beta"))
            want_o, want_state = by_hand(*head, g, strength)
            torch.testing.assert_close(o[b, h], want_o)
            torch.testing.assert_close(state[b, h], want_state)


@pytest.mark.parametrize("rule", RULES)
def test_registration(rule: str) -> None:
    given = operands(rule, N=5, Dk=4, Dv=3)
    given = leaves(given if rule in ("gated", "delta") else tokens_first(given))
    state = torch.randn(1, 2, 4, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.gatecc.linear_attention.default, (), {**given, "initial_state": state})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_of_every_input(rule: str, reverse: bool) -> None:
    given = leaves(double(operands(rule, H=2, N=4, Dk=2, Dv=3, k=1, v=1)))
    given["initial_state"] = torch.randn(1, 2, 2, 3, dtype=torch.double, requires_grad=True)
    names = tuple(given)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        inputs: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return linear_attention(**inputs, reverse=reverse)

    assert torch.autograd.gradcheck(call, tuple(given.values()))


def test_gradcheck_of_the_normaliser_and_padding() -> None:
    q, k = (torch.rand(2, 2, 4, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    v, g = (torch.randn(2, 1, 4, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[False, True, True, True], [True, True, False, False]])

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(q, k, v, g, normalize=True, mask=mask)

    assert torch.autograd.gradcheck(call, (q, k, v, g))


def test_normalised_weights_sum_to_one() -> None:
    q, k = (torch.rand(1, 2, 6, 4) for _ in range(2))
    o, state = linear_attention(q, k, torch.ones(1, 2, 6, 3), normalize=True)
    torch.testing.assert_close(o, torch.ones_like(o))
    assert state.shape == (1, 2, 4, 4)
    torch.testing.assert_close(state[..., -1], k.sum(2))


def test_nothing_is_divided_by_zero() -> None:
    o, _ = linear_attention(*(torch.zeros(1, 1, 3, 4) for _ in range(3)), normalize=True)
    assert torch.equal(o, torch.zeros_like(o))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_as_if_it_were_not_there(rule: str, reverse: bool) -> None:
    given = double(operands(rule, N=7))
    o, state = linear_attention(**given, reverse=reverse)
    wide: dict[str, Any] = {
        name: torch.cat([torch.full_like(x[:, :, :2], float("nan")), x], 2) for name, x in given.items()
    }
    wide["q"] = wide["q"].nan_to_num()
    mask = torch.arange(9)[None] >= 2
    padded_o, padded_state = linear_attention(**wide, mask=mask, reverse=reverse)
    torch.testing.assert_close(padded_o[:, :, 2:], o)
    assert not padded_o[:, :, :2].any()
    torch.testing.assert_close(padded_state, state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_separate(rule: str, reverse: bool) -> None:
    given = double(operands(rule, N=9))
    starts = torch.randn(3, 2, 16, 16, dtype=torch.double)
    options: dict[str, Any] = {"reverse": reverse}
    edges = [0, 4, 4, 9]
    o, state = linear_attention(**given, initial_state=starts, cu_seqlens=torch.tensor(edges), **options)
    for i, (first, last) in enumerate(pairwise(edges)):
        part: dict[str, Any] = {name: x[:, :, first:last] for name, x in given.items()}
        want_o, want_state = linear_attention(**part, initial_state=starts[i : i + 1], **options)
        torch.testing.assert_close(o[:, :, first:last], want_o)
        torch.testing.assert_close(state[i : i + 1], want_state)


def test_a_sequence_in_two_parts() -> None:
    given = double(operands("gated_delta", N=9))
    o, state = linear_attention(**given)
    first, middle = linear_attention(**{name: x[:, :, :5] for name, x in given.items()})
    second, last = linear_attention(**{name: x[:, :, 5:] for name, x in given.items()}, initial_state=middle)
    torch.testing.assert_close(torch.cat([first, second], 2), o)
    torch.testing.assert_close(last, state)


def test_constant_decay_is_retention() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, dtype=torch.double) for _ in range(3))
    gamma = 1 - 2.0 ** (-5 - torch.arange(4.0, dtype=torch.double))
    o, _ = linear_attention(q, k, v, gamma.log().view(1, 4, 1, 1))
    distance = torch.arange(6)[:, None] - torch.arange(6)[None]
    weights = (gamma.view(4, 1, 1) ** distance).tril()
    torch.testing.assert_close(o, (q @ k.mT * weights * 8**-0.5) @ v)


def test_both_directions() -> None:
    given = operands("gated", N=6)
    turned = {name: x.flip(2) for name, x in given.items()}
    want = linear_attention(**given)[0] + linear_attention(**turned)[0].flip(2)
    torch.testing.assert_close(bidirectional(**given, mean=False), want)
    torch.testing.assert_close(bidirectional(**given), want / 2)


@pytest.mark.parametrize("rule", RULES)
def test_no_tokens(rule: str) -> None:
    state = torch.randn(1, 2, 16, 16)
    o, final = linear_attention(**operands(rule, N=0), initial_state=state)
    assert o.shape == (1, 2, 0, 16)
    assert torch.equal(final, state)
    assert final.data_ptr() != state.data_ptr()


class Mixer(nn.Module):
    """A layer as models have it: heads split from channels, so the operands are transposed views."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, g = x.unflatten(-1, (4, 2, 4)).permute(2, 0, 3, 1, 4)
        o, state = torch.ops.gatecc.linear_attention(q, k, v, -g.square(), mask=mask)
        return o.transpose(1, 2).flatten(2), state


def test_export_with_symbolic_sizes() -> None:
    x, mask = torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.bool)
    B, N = torch.export.Dim("B"), torch.export.Dim("N")
    program = torch.export.export(Mixer(), (x, mask), dynamic_shapes=({0: B, 1: N}, {0: B, 1: N})).run_decompositions(
        {}
    )
    assert "gatecc.linear_attention.default" in str(program.graph)
    other = torch.randn(3, 11, 32)
    mask = torch.rand(3, 11) < 0.7
    torch.testing.assert_close(program.module()(other, mask), Mixer()(other, mask))


def test_compile_without_a_graph_break() -> None:
    x = torch.randn(2, 6, 32, requires_grad=True)
    mask = torch.ones(2, 6, dtype=torch.bool)
    compiled = torch.compile(Mixer(), fullgraph=True, dynamic=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(Mixer()(x, mask)[0].square().sum(), x)
    (found,) = torch.autograd.grad(compiled(x, mask)[0].square().sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_in_the_place_of_log_decays(dtype: torch.dtype) -> None:
    given = {name: x.to(dtype) for name, x in operands("gated_delta", B=2, N=7, log_decay=1).items()}
    logits = given.pop("log_decay").normal_().mul_(4).requires_grad_()
    mask = torch.arange(7)[None] >= torch.tensor([[0], [3]])
    fused = linear_attention(**given, log_decay=logits, mask=mask, gate_normalizer=8.0)
    apart = linear_attention(**given, log_decay=F.logsigmoid(logits) / 8, mask=mask)
    for found, expected in zip(fused, apart, strict=True):
        torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(o.square().sum() + state.sum(), logits)[0] for o, state in (fused, apart)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(dtype: torch.dtype) -> None:
    given = operands("gated_delta", N=20)
    low = {name: x.to(dtype) for name, x in given.items()}
    o, state = linear_attention(**low)
    assert o.dtype == dtype
    assert state.dtype == torch.float32
    want_o, want_state = linear_attention(**double(low))
    assert relative(o, want_o) < 2 * torch.finfo(dtype).eps
    assert relative(state, want_state) < 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"k": torch.zeros(1, 3, 9, 16)}, "heads of k do not divide"),
    "tokens": ({"k": torch.zeros(1, 2, 8, 16)}, "k does not fit"),
    "dtype": ({"v": torch.zeros(1, 2, 9, 16, dtype=torch.half)}, "one dtype"),
    "decay": ({"log_decay": torch.zeros(1, 2, 9, 5)}, "log_decay does not fit"),
    "beta": ({"beta": torch.zeros(1, 2, 8)}, "beta does not fit"),
    "normaliser": ({"beta": torch.zeros(1, 2, 9), "normalize": True}, "no normaliser"),
    "state": ({"initial_state": torch.zeros(1, 2, 16, 15)}, "initial_state does not fit"),
    "mask": ({"mask": torch.ones(1, 9)}, "torch.bool"),
    "packed": ({"cu_seqlens": torch.tensor([0, 4])}, "does not divide the tokens"),
    "no logits": ({"gate_normalizer": 16.0}, "gate_normalizer divides"),
    "sign": ({"log_decay": torch.zeros(1, 2, 9, 1), "gate_normalizer": -1.0}, "gate_normalizer divides"),
    "axes": ({"q": torch.zeros(2, 9, 16)}, "four axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        linear_attention(**{**operands("linear"), **change})
