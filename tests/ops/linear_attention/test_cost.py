"""FLOPs through torch's counter: linear in the tokens, equal to the products of the recurrence counted one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatecc.ops.linear_attention import cost, linear_attention, linear_attention_step
from gatecc.ops.linear_attention.reference import token_by_token
from tests.ops.linear_attention.cases import RULES, leaves, operands


def counted(rule: str, N: int) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass."""
    given = leaves(operands(rule, N=N, Dk=4, Dv=6))
    with FlopCounterMode(display=False) as forward:
        o, _ = linear_attention(**given)
    with FlopCounterMode(display=False) as backward:
        o.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("rule", RULES)
def test_the_counter_knows_the_operator(rule: str) -> None:
    forward, backward = counted(rule, 8)
    products = 3 if "delta" in rule else 2
    assert forward == 2 * products * 2 * 8 * 4 * 6
    assert forward < backward <= 3 * forward
    assert counted(rule, 16) == (2 * forward, 2 * backward)


@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_reads_of_the_state_are_those_of_the_recurrence(rule: str) -> None:
    """torch counts the reads of the reference, which are products of matrices; its writes are pointwise there."""
    x = operands(rule, N=5, Dk=4, Dv=6)
    beta = x["beta"].unsqueeze(-1) if "beta" in x else None
    with FlopCounterMode(display=False) as reads:
        token_by_token(x["q"], x["k"], x["v"], x["log_decay"], beta, torch.zeros(1, 2, 4, 6))
    writes = 2 * 2 * 5 * 4 * 6
    assert reads.get_total_flops() + writes == counted(rule, 5)[0]


def test_a_step_is_a_token() -> None:
    x = operands("gated", N=1, Dk=4, Dv=6)
    token: Any = [x[name][:, :, 0] for name in ("q", "k", "v", "log_decay")]
    with FlopCounterMode(display=False) as counter:
        linear_attention_step(*token, beta=None, state=torch.zeros(1, 2, 4, 6))
    assert counter.get_total_flops() == counted("gated", 1)[0]


def test_bytes() -> None:
    assert cost.moved_bytes(torch.zeros(2, 3), None, torch.zeros(4, dtype=torch.bfloat16)) == 32
