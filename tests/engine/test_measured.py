"""What a report says of experts is what ran: slots that hold one, and parameters that tokens met."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.route import Route

D, F_, T = 6, 12, 20
MLP = 2 * 2 * D * F_  # operations of the dense layer, for a token


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, F_), nn.Linear(F_, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def taken(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def above(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return ((p > 0.3) | (p == p.amax(-1, keepdim=True))).sum(-1)


CASES: dict[str, tuple[dict[str, Any], int, Callable[[Tensor], Tensor]]] = {
    # options, how many share the neurons of the layer, and how many experts run for a token, from the router's logits
    "skip": (
        {"choice": "softmax_topk(1, straight=True)", "experts": "copies(3)", "skip": True},
        1,
        lambda logits: taken(logits) < 3,
    ),
    "prefix": ({"choice": "prefix(lead=0)", "experts": "split(4)", "combine": "prefix"}, 4, taken),
    "threshold": ({"choice": "threshold(0.3)", "experts": "copies(4)"}, 1, above),
}


def routed(choice: str, experts: str, balance: str = "none", **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    router = RouterSpec("in", "linear(bias=False)", choice, "random(std=1)", balance)
    x = torch.randn(2, T // 2, D)
    return gatecc.transform(Net().eval(), Route("mlp[...]", router, experts, **options), (x,)), x


@pytest.mark.parametrize("name", CASES)
def test_operations_and_parameters_are_those_that_tokens_meet(name: str) -> None:
    options, shards, runs = CASES[name]
    model, x = routed(**options)
    totals = gatecc.last_report(model).totals
    ran = int(runs(x.flatten(0, 1) @ model.router.weight.T).sum())
    assert 0 < ran < T * 3
    scores = 2 * T * D * model.router.weight.size(0)
    assert totals.flops_before == T * MLP
    assert totals.flops_after == scores + ran * MLP // shards
    assert gatecc.inspect(model, (x,)).totals.flops_before == totals.flops_after
    experts = model.experts
    stacked = sum(p.numel() for n, p in experts.named_parameters() if n != "bias")
    count = experts.down_proj.size(0)
    idle = stacked * (1 - ran / (T * count))
    assert totals.active_after == sum(p.numel() for p in model.parameters()) - round(idle)


def test_what_a_capacity_drops_is_no_work() -> None:
    model, x = routed("softmax_topk(1, straight=True)", "copies(4)", "capacity(1.0)")
    chosen = taken(x.flatten(0, 1) @ model.router.weight.T).bincount(minlength=4)
    served = int(chosen.clamp(max=T // 4).sum())
    assert served < T
    assert counted(lambda: model.train()(x))[1] == 2 * T * D * 4 + served * MLP
    assert counted(lambda: model.eval()(x))[1] == 2 * T * D * 4 + T * MLP
