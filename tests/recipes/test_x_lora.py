"""X-LoRA, against two forwards that are written down."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.recipes import samples
from tests.recipes.checks import new_parameters, randomise

SITES = "linear[*.q_proj,*.up]"


def _adapted(plain: nn.Module, model: Any, weigh: Any) -> Tensor:
    """The second pass by hand: every adapted Linear adds its experts, weighed by weigh(number of the bank)."""
    second = copy.deepcopy(plain)
    names = [name for name, _ in second.named_modules() if name.endswith((".q_proj", ".up"))]
    for number, name in enumerate(names):
        bank = model.get_submodule(f"{name}.loras")

        def hook(module: nn.Module, args: Any, y: Tensor, bank: Any = bank, number: int = number) -> Tensor:
            each = [args[0] @ a.T @ b * bank.alpha / len(a) for a, b in zip(bank.a, bank.b, strict=True)]
            return y + (torch.stack(each, -1) * weigh(number).unsqueeze(-2)).sum(-1)

        second.get_submodule(name).register_forward_hook(hook)
    return second(*samples.language()[1])


def _scores(plain: nn.Module, model: Any) -> Tensor:
    seen: list[Tensor] = []
    first = copy.deepcopy(plain)
    first.get_submodule("head").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first(*samples.language()[1])
    last = model.head.classifier.layers[0]
    return (seen[0] @ last.weight.T + last.bias).unflatten(-1, (-1, 3))


@pytest.mark.parametrize("k", [0, 2])
@torch.no_grad()
def test_the_second_pass_is_weighed_by_the_first(k: int) -> None:
    plain, inputs = samples.language()
    recipe = gatecc.recipe("x-lora", sites=SITES, experts=3, rank=2, T=2.0, k=k)
    model = gatecc.transform(plain, recipe, inputs, verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    scores = _scores(plain, model) / 2.0
    if k:
        scores = scores.masked_fill(scores < scores.topk(k, -1).values[..., -1:], -torch.inf)
    weights = scores.softmax(-1)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 8, 4))  # each token's own, in 4 banks
    assert torch.allclose(model(*inputs), _adapted(plain, model, lambda number: weights[..., number, :]), atol=1e-5)


@torch.no_grad()
def test_one_expert_is_that_adapter_and_the_report_speaks_of_two_passes() -> None:
    plain, inputs = samples.language()
    model = gatecc.transform(plain, gatecc.recipe("x-lora", sites=SITES, experts=1, rank=2), inputs, verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    assert torch.allclose(model(*inputs), _adapted(plain, model, lambda _: torch.ones(2, 8, 1)), atol=1e-5)
    report = gatecc.last_report(model)
    assert any("runs the model twice" in note for note in report.notes)
    before, after = report.totals.flops_before, report.totals.flops_after
    assert before is not None
    assert after is not None
    assert after > 1.8 * before  # the head and what comes before the first adapter run once
