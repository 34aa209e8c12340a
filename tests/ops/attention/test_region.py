"""What is made of attention's heads as part of its kernel: printed from FX nodes, differentiated, refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.codegen.judge.interpreted import interpreting
from gatecc.codegen.regions.region import RefusedError
from gatecc.ops.attention import reference
from gatecc.ops.attention.arguments import arguments
from gatecc.ops.attention.region import attention_region
from tests.ops.attention.cases import operands, to

B, H, G, D, E = 2, 4, 2, 8, 20


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GATECC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def normed(heads: Tensor, gate: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """A norm of each head, a gate by tanh, and a share of the heads as they were, one for each head."""
    return F.rms_norm(heads, (heads.size(-1),), scale, 1e-5) * torch.tanh(gate) + heads * weight


def tensors(N: int) -> list[Tensor]:
    """What ``normed`` reads besides the heads; the gate lies as a projection gives it."""
    gate = torch.randn(B, N, H, E).transpose(1, 2)
    return [gate, torch.randn(E), torch.randn(1, H, 1, 1)]


def module_of(following: Callable[..., Tensor], others: list[Tensor], N: int = 33, **options: Any) -> Any:
    return attention_region(following, torch.randn(B, H, N, E), others, ["a test"], **options)


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window and cap": {"causal": True, "window": 9, "softcap": 2.0},
    "all": {"scale": 0.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_kernel_operator_and_gradients(name: str) -> None:
    """At another length than that of the example; against attention in float64 with the same behind it."""
    torch.manual_seed(0)
    options = OPTIONS[name]
    module = module_of(normed, tensors(33), **options)
    case = operands(B=B, H=H, G=G, N=40, S=50, D=D, E=E, sinks=True, bias=(1, H, 40, 50))
    names = ("q", "k", "v", "bias", "sinks")
    low: dict[str, Tensor] = to({n: case[n] for n in names}, torch.float32)
    given = [x.detach().requires_grad_() for x in (*low.values(), *tensors(40))]
    doubles = [x.detach().double().requires_grad_() for x in given]
    inner = dict(zip(names, doubles, strict=False))
    heads, sums = reference.attention(arguments(**inner, **options))
    wanted = normed(heads, *doubles[5:])
    with interpreting(module) as findings, torch.no_grad():
        found, logsumexp = module.launch(*given)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(logsumexp.double(), sums, atol=2e-5, rtol=2e-5)
    assert (findings.outside, findings.raced) == ([], [])
    out, logsumexp = module.operator(*given)
    torch.testing.assert_close(out.double(), wanted, atol=2e-5, rtol=2e-5)
    grad, of_sums = torch.randn_like(out), torch.randn_like(logsumexp)
    ours = torch.autograd.grad((out, logsumexp), given, (grad, of_sums))
    exact = torch.autograd.grad((wanted, sums), doubles, (grad.double(), of_sums.double()))
    for x, y in zip(ours, exact, strict=True):
        assert (x.double() - y).abs().max() <= 1e-5 * (1 + y.abs().max())


def test_the_operator_is_one_for_compilers() -> None:
    module = module_of(lambda h, g: h * F.softplus(g), [torch.randn(B, H, 33, 1)], causal=True)
    given = [*(torch.randn(B, n, 33, w, requires_grad=True) for n, w in ((H, D), (G, D), (G, E))), None, None]
    gate = torch.randn(B, H, 33, 1, requires_grad=True)
    assert set(torch.library.opcheck(module.operator, (*given, gate)).values()) == {"SUCCESS"}


def test_what_follows_no_head_is_refused() -> None:
    def mixed(heads: Tensor, w: Tensor) -> Tensor:
        return heads @ w

    refused: list[tuple[Callable[..., Any], list[Tensor], str]] = [
        (mixed, [torch.randn(E, E)], "elementwise"),
        (lambda h: (h.relu(), h.sigmoid()), [], "one result"),
        (lambda h: h.cumsum(-1), [], "cumsum"),
        (lambda h: h.flip(2), [], "flip"),
        (lambda h, g: h * g[0], [torch.randn(2, B, H, 33, E)], "select"),
    ]
    for following, others, why in refused:
        with pytest.raises(RefusedError, match=why):
            module_of(following, others)
