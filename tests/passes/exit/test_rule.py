"""Rules: scores of logits, each computed a second time by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.passes.exit.rule import Calibrated, CalibratedRule, Confidence, ExitRule, Learned, LearnedRule


def entropy(p: list[float]) -> float:
    return -sum(x * math.log(x) for x in p) / math.log(len(p))


def test_confidence_by_hand() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, 5, dtype=torch.float64) * 2
    for row in z:
        p = sorted(row.softmax(-1).tolist())
        powered = [x**3 / sum(y**3 for y in p) for x in p]
        expected = {"pmax": p[-1], "margin": p[-1] - p[-2], "entropy": 1 - entropy(p), "powered": 1 - entropy(powered)}
        for of, score in expected.items():
            found = ExitRule.coerce(f"confidence(of={of}, power=3)").module(5).score(row[None])
            assert float(found) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("of", ["pmax", "margin", "entropy", "powered"])
def test_above_one_nobody_leaves_and_at_zero_everybody(of: str) -> None:
    z = torch.tensor([[1e4, 0.0, 0.0], [1.0, 1.0, 1.0], [float("nan"), 0.0, 0.0]])  # pmax is 1.0 exactly
    for threshold, stays in ((1.01, [True, True, True]), (1.0, [False, True, True]), (-0.001, [False, False, True])):
        rule = Confidence(threshold, of).module(3)  # pyright: ignore[reportArgumentType]
        assert rule(z).squeeze(-1).tolist() == stays


def test_learned_by_hand_and_without_gradient_of_the_logits() -> None:
    rule = Learned(0.5).module(4)
    assert isinstance(rule, LearnedRule)
    assert float(rule.score(torch.randn(1, 4))) == 0.5
    with torch.no_grad():
        rule.gate.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, 0.5]]))
        rule.gate.bias.fill_(0.25)
    z = torch.randn(3, 4, requires_grad=True)
    p = z.softmax(-1)
    top = p.topk(2).values
    square = p**2 / (p**2).sum(-1, keepdim=True)
    h, h2 = (-(x * x.log()).sum(-1) / math.log(4) for x in (p, square))
    expected = torch.sigmoid(top[:, 0] - 2 * h + 3 * (top[:, 0] - top[:, 1]) + 0.5 * h2 + 0.25)
    assert torch.allclose(rule.score(z), expected, atol=1e-6)
    rule.score(z).sum().backward()
    assert z.grad is None


def sdm(z: Tensor, exemplars: Tensor, labels: Tensor) -> list[float]:
    """The equations of the rule, sample by sample."""
    near = [min(float((a - b).norm()) for j, b in enumerate(exemplars) if i != j) for i, a in enumerate(exemplars)]
    found: list[float] = []
    for one in z:
        far = [float((one - e).norm()) for e in exemplars]
        q = 0
        for i in sorted(range(len(far)), key=far.__getitem__):
            if not int(exemplars[i].argmax()) == int(labels[i]) == int(one.argmax()):
                break
            q += 1
        d = sum(n >= min(far) for n in near) / len(near)
        powers = [(2 + q) ** (d * float(x)) for x in one]
        found.append(max(powers) / sum(powers))
    return found


def test_calibrated_by_hand_and_softmax_before_it_is_fitted() -> None:
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (12,))
    exemplars = torch.randn(12, 3) + 2 * torch.nn.functional.one_hot(labels, 3)
    z = torch.randn(6, 3) * 1.5
    rule = Calibrated(exemplars=12).module(3)
    assert isinstance(rule, CalibratedRule)
    assert torch.allclose(rule.score(z), z.softmax(-1).amax(-1))
    rule.fit(exemplars, labels)
    found = rule.score(z)
    assert found.tolist() == pytest.approx(sdm(z, exemplars, labels), abs=1e-5)
    assert not torch.allclose(found, z.softmax(-1).amax(-1), atol=1e-2)


def test_refused() -> None:
    with pytest.raises(ArgumentError, match="power"):
        Confidence(power=0.0)
    with pytest.raises(ArgumentError, match="two or more"):
        Calibrated(exemplars=1)
