"""MHR and Poly, against the mixture of factors that is written down."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.split_low_rank import SplitLoras
from gatecc.recipes import samples
from tests.graphs import MLP, done
from tests.recipes.checks import new_parameters, randomise

ONE = {"sites": "linear[*.0.*.q_proj]", "experts": 3, "rank": 2, "tasks": 2, "alpha": 4.0}


def _made(recipe: str, **options: Any) -> tuple[nn.Module, Any, Any]:
    plain, inputs = samples.conditioned()
    model = gatecc.transform(plain, gatecc.recipe(recipe, **ONE, **options), inputs, verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    return plain, model, inputs


def _by_hand(plain: nn.Module, inputs: Any, deltas: list[Tensor]) -> Tensor:
    """Sample by sample: its q_proj has its task's delta added to the weight."""
    (x,), given = inputs
    rows: list[Tensor] = []
    for sample, text, delta in zip(x, given["text"], deltas, strict=True):
        adapted = copy.deepcopy(plain)
        adapted.get_parameter("blocks.0.attn.q_proj.weight").data.add_(delta)
        rows.append(adapted(sample.unsqueeze(0), text=text.unsqueeze(0)))
    return torch.cat(rows)


@pytest.mark.parametrize("splits", [1, 2, 4])
@torch.no_grad()
def test_factors_are_mixed_by_the_task_in_each_split(splits: int) -> None:
    plain, model, inputs = _made("mhr", splits=splits)
    linear = model.blocks[0].attn.q_proj
    table, a, b = linear.weights.weight, linear.loras.a, linear.loras.b
    deltas: list[Tensor] = []
    for task in inputs[1]["task"]:
        z = table[task].view(splits, 3).sigmoid()
        w = z / z.sum(-1, keepdim=True)
        mixed_a = torch.cat([(w[s, :, None, None] * a[s]).sum(0) for s in range(splits)])
        mixed_b = torch.cat([(w[s, :, None, None] * b[s]).sum(0) for s in range(splits)], -1)
        deltas.append(2.0 * (mixed_a @ mixed_b).T)
    args, kwargs = inputs
    assert torch.allclose(model(*args, **kwargs), _by_hand(plain, inputs, deltas), atol=1e-5)
    if splits == 1:
        _, poly, _ = _made("poly")
        assert torch.equal(poly(*args, **kwargs), model(*args, **kwargs))


@torch.no_grad()
def test_an_unknown_task_gets_the_mean_adapter() -> None:
    plain, model, (args, kwargs) = _made("mhr", splits=2)
    loras = model.blocks[0].attn.q_proj.loras
    a, b = loras.a.mean(1).flatten(0, 1), torch.cat(list(loras.b.mean(1)), -1)
    unknown = {**kwargs, "task": torch.zeros(2, dtype=torch.long)}
    expected = _by_hand(plain, (args, kwargs), [2.0 * (a @ b).T] * 2)
    assert torch.allclose(model(*args, **unknown), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("splits", "gate", "match"),
    [
        (3, "param, none, expert, linear", "splits are not of one size"),
        (2, "in, linear, expert, linear, init=zero", "mixed once for all tokens"),
    ],
)
def test_what_does_not_fit_is_refused(splits: int, gate: str, match: str) -> None:
    with pytest.raises(SiteRefusedError, match=match):
        done(MLP, Branch(gatecc.MLP[...].out, SplitLoras(2, splits), gatecc.GateSpec.parse(gate)))
