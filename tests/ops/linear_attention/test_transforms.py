"""Higher derivatives, forward mode and torch.func, against loops over samples and the recurrence written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import linear_attention, linear_attention_step
from gatecc.ops.linear_attention.reference import token_by_token
from tests.ops.linear_attention.cases import RULES, operands

Function = Callable[..., Tensor]


def case(rule: str, state: bool, dtype: torch.dtype = torch.double) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    given = operands(rule, B=2, H=2, N=4, Dk=3, Dv=2, k=1)
    if state:
        given["initial_state"] = torch.randn(2, 2, 3, 2)
    return tuple(given), tuple(x.to(dtype) for x in given.values())


def scalar(names: tuple[str, ...], operator: Callable[..., Any]) -> Function:
    def function(*tensors: Tensor) -> Tensor:
        o, state = operator(**dict(zip(names, tensors, strict=True)))
        return o.square().sum() + (state * 0.5).sum()

    return function


def written_out(q: Tensor, k: Tensor, v: Tensor, **rest: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence as plain ATen, with shared heads of k repeated by hand."""
    state = rest.get("initial_state", q.new_zeros(2, 2, 3, 2))
    beta = rest.get("beta")
    strength = None if beta is None else beta.unsqueeze(-1)
    return token_by_token(q * 3**-0.5, k.repeat_interleave(2, 1), v, rest.get("log_decay"), strength, state)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", [False, True])
def test_second_derivatives_and_forward_mode(rule: str, state: bool) -> None:
    names, tensors = case(rule, state)
    leaves = tuple(x.clone().requires_grad_() for x in tensors)

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        named: dict[str, Any] = dict(zip(names, given, strict=True))
        return linear_attention(**named)

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("rule", RULES)
def test_float32_has_the_derivatives_of_float64(rule: str) -> None:
    """float32 goes through a kernel first, float64 does not."""
    names, tensors = case(rule, state=True, dtype=torch.float32)
    own, truth = scalar(names, linear_attention), scalar(names, written_out)
    wide, every = tuple(x.double() for x in tensors), tuple(range(len(tensors)))
    for found in (
        hessian(own, argnums=every)(*tensors),
        torch.autograd.functional.hessian(own, tensors),  # twice in reverse
    ):
        torch.testing.assert_close(
            double_of(found), torch.autograd.functional.hessian(truth, wide), atol=1e-4, rtol=1e-4
        )
    tangents = tuple(torch.randn_like(x) for x in tensors)
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(x, t) for x, t in zip(tensors, tangents, strict=True))
        found = forward_ad.unpack_dual(own(*duals)).tangent
    wanted = jvp(truth, wide, tuple(t.double() for t in tangents))[1]
    torch.testing.assert_close(double_of(found), wanted, atol=1e-4, rtol=1e-4)


def double_of(nested: Any) -> Any:
    return tuple(map(double_of, nested)) if isinstance(nested, tuple) else nested.double()


@pytest.mark.parametrize("rule", RULES)
def test_samples_of_a_vmap(rule: str) -> None:
    names, tensors = case(rule, state=True, dtype=torch.float32)
    function, every = scalar(names, linear_attention), tuple(range(len(tensors)))
    samples = [tuple(x * factor for x in tensors) for factor in (1.0, 0.5)]
    together = tuple(map(torch.stack, zip(*samples, strict=True)))
    torch.testing.assert_close(vmap(function)(*together), torch.stack([function(*s) for s in samples]))
    found = vmap(grad(function, argnums=every))(*together)
    for at, sample in enumerate(samples):
        leaves = tuple(x.clone().requires_grad_() for x in sample)
        for one, wanted in zip(found, torch.autograd.grad(function(*leaves), leaves), strict=True):
            torch.testing.assert_close(one[at], wanted, atol=1e-5, rtol=1e-4)


class Mixer(torch.nn.Module):
    """Projections and the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 12)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 1, 4)).permute(2, 0, 3, 1, 4)
        return linear_attention(q, k, v, mask=mask)[0]


def test_a_module_by_functional_call() -> None:
    module, x = Mixer(), torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    weights = {n: p.detach() for n, p in module.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
        return functional_call(module, weights, (x, mask)).square().mean()

    module(x, mask).square().mean().backward()
    for name, found in grad(loss)(weights, x, mask).items():
        torch.testing.assert_close(found, module.get_parameter(name).grad)
    apart = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x[:, None], mask[:, None])
    for name, found in apart.items():
        torch.testing.assert_close(found.mean(0), module.get_parameter(name).grad)


def test_a_compiled_transform() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))

    def slope(q: Tensor) -> Tensor:
        return grad(lambda q: linear_attention(q, k, v)[0].square().sum())(q)

    torch.testing.assert_close(torch.compile(slope, backend="aot_eager", fullgraph=True)(q), slope(q))


def test_a_second_derivative_through_a_checkpoint() -> None:
    q, k, v = (torch.randn(1, 1, 6, 4, requires_grad=True) for _ in range(3))

    def loss(q: Tensor) -> Tensor:
        return linear_attention(q, k, v)[0].square().sum()

    found = []
    for y in (loss(q), checkpoint(loss, q, use_reentrant=False)):
        (first,) = torch.autograd.grad(y, q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (q, k, v)))
    torch.testing.assert_close(*found)


def test_nothing_is_divided_by_zero_in_a_derivative() -> None:
    def function(q: Tensor) -> Tensor:
        return linear_attention(q, torch.zeros_like(q), q, normalize=True)[0].sum()

    assert torch.equal(jacrev(function)(torch.randn(1, 1, 3, 2)), torch.zeros(1, 1, 3, 2))
    assert not hessian(function)(torch.randn(1, 1, 3, 2)).any()


def test_packed_sequences_are_packed_alike_in_a_vmap() -> None:
    given = operands("gated", N=6)
    edges = torch.tensor([0, 2, 6])
    found = vmap(lambda v: linear_attention(given["q"], given["k"], v, cu_seqlens=edges)[0])(given["v"][None])
    torch.testing.assert_close(found[0], linear_attention(given["q"], given["k"], given["v"], cu_seqlens=edges)[0])
    with pytest.raises(ArgumentError, match="one for a whole vmap"):
        vmap(lambda e: linear_attention(given["q"], given["k"], given["v"], cu_seqlens=e)[0])(edges[None])


def test_a_step_has_no_derivative() -> None:
    q, k, v = (torch.randn(1, 1, 2) for _ in range(3))
    state = torch.zeros(1, 1, 2, 2)

    def step(q: Tensor) -> Tensor:
        return linear_attention_step(q, k, v, None, None, state)

    for derive in (
        lambda: step(q.requires_grad_()),
        lambda: grad(lambda q: step(q).sum())(k),
        lambda: vmap(step)(k[None]),
    ):
        with pytest.raises(ArgumentError, match="no derivative"):
            derive()
    assert not state.any()
    with torch.no_grad():
        torch.testing.assert_close(step(q), linear_attention(*(x.unsqueeze(2) for x in (q, k, v)))[0].squeeze(2))
