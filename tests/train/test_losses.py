"""Losses of healing against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.train import kld, next_token_loss, topk_kld


def logits(seed: int, size: int = 9, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = spread * torch.randn(2, 4, 3, size, generator=g)
    return a, b


def full(student: Tensor, teacher: Tensor) -> Tensor:
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def test_kl_is_torchs() -> None:
    student, teacher = logits(0)
    torch.testing.assert_close(kld(student, teacher).double(), full(student, teacher), atol=1e-5, rtol=1e-5)
    soft = kld(student, teacher, temperature=2.0).double()
    torch.testing.assert_close(soft, 4 * full(student / 2, teacher / 2), atol=1e-5, rtol=1e-5)
    keep = torch.rand(4, 3) > 0.5
    torch.testing.assert_close(kld(student, teacher, keep=keep), kld(student[keep], teacher[keep]))


@given(seed=st.integers(0, 1000), k=st.integers(1, 12), weight=st.floats(0, 2), spread=st.floats(0.1, 30))
def test_topk_kld_splits_the_kl(seed: int, k: int, weight: float, spread: float) -> None:
    """k = V and weight = 1 are the plain KL, the loss grows with the weight, is not negative, and 0 at equality."""
    student, teacher = logits(seed, spread=spread)
    whole = full(student, teacher).float()
    torch.testing.assert_close(topk_kld(student, teacher, 9, weight), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(topk_kld(student, teacher, k, 1.0), whole, atol=1e-4, rtol=1e-4)
    loss = topk_kld(student, teacher, k, weight)
    assert -1e-6 <= float(loss) <= max(weight, 1) * float(whole) + 1e-4
    assert abs(float(topk_kld(teacher, teacher, k, weight))) < 1e-5


def test_topk_kld_sees_the_remainder_as_one_event() -> None:
    """Without its last part the loss does not depend on how the student divides the remainder's mass."""
    teacher = torch.tensor([[4.0, 3, 1, 0, -1]])
    student = torch.tensor([[2.0, 3, 1, 0, 1]])
    moved = student[:, [0, 1, 4, 2, 3]]
    torch.testing.assert_close(topk_kld(student, teacher, 2), topk_kld(moved, teacher, 2))
    assert float(topk_kld(student, teacher, 2, 1.0) - topk_kld(moved, teacher, 2, 1.0)) != 0
    p, q = (
        torch.cat((x.softmax(-1)[:, :2], x.softmax(-1)[:, 2:].sum(-1, keepdim=True)), -1) for x in (teacher, student)
    )
    torch.testing.assert_close(topk_kld(student, teacher, 2), (p * (p / q).log()).sum())


@pytest.mark.parametrize("k", [1, 3, 9])
def test_gradients_are_finite_and_reach_the_student_alone(k: int) -> None:
    student, teacher = logits(1, spread=40.0)
    for x in (student, teacher):
        x.requires_grad_()
    topk_kld(student, teacher, k, 0.3).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert float(student.grad.abs().sum()) > 0
    assert teacher.grad is None


def test_the_next_token_is_asked_and_ignored_labels_are_not() -> None:
    out, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, 3:] = -100
    want = torch.stack([F.cross_entropy(out[b, n - 1], labels[b, n]) for b in (0, 1) for n in range(1, 5)
                        if labels[b, n] >= 0]).mean()  # fmt: skip
    torch.testing.assert_close(next_token_loss(out, labels), want)


def test_what_makes_no_sense_is_refused() -> None:
    student, teacher = logits(0)
    for wrong in (
        lambda: kld(student, teacher[..., :5]),
        lambda: kld(student, teacher, temperature=0),
        lambda: topk_kld(student, teacher, 0),
        lambda: topk_kld(student, teacher, 2, -1.0),
        lambda: next_token_loss(student, torch.zeros(4, 2).long()),
    ):
        with pytest.raises(ArgumentError):
            wrong()
