"""Losses of healing: next token cross entropy, and distillation of a teacher's logits.

All logits are (..., V) and are read in float32; a loss is the mean over positions, in nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError

IGNORED = -100  # the label of a position that is left out, as in torch's cross entropy


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the token after each position: logits (B, N, V), labels (B, N), those of -100 left out.

    ``labels`` stand where the tokens do (the convention of transformers); the shift by one is done here.
    """
    if logits.shape[:-1] != labels.shape:
        raise ArgumentError(
            "labels and logits differ in shape", found=f"{tuple(labels.shape)}", expected=f"{tuple(logits.shape[:-1])}"
        )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def kld(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, keep: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of two sets of logits (..., V), times temperature² (Hinton et al., 2015).

    ``keep`` (...): positions that count. The temperature softens both; its square keeps the size of the gradient.
    """
    p, q = _log_probabilities(student, teacher, temperature)
    return _mean((p.exp() * (p - q)).sum(-1), keep) * temperature**2


def template_loss(scores: Tensor, similarity: Tensor, k: int = 2, raised: float = 10.0) -> Tensor:
    """The gate loss of MoCoOp: cross entropy of a router's scores (B, E) with a softmax over similarities (B, E).

    ``similarity`` is that of an image to the hand-written template of each group; the k largest are raised.
    """
    top = similarity.detach().float().topk(k, -1).indices
    target = similarity.detach().float().scatter_add(-1, top, torch.full_like(top, raised, dtype=torch.float32))
    return F.cross_entropy(scores.float(), torch.softmax(target, -1))


def topk_kld(
    student: Tensor,
    teacher: Tensor,
    k: int = 10,
    weight: float = 0.0,
    *,
    temperature: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """TopKLD: the teacher's k likeliest tokens one by one, the remainder as one event, times temperature².

    The chain rule splits KL(p || q) in three parts, none of them negative: how the mass is divided between the top k
    and the remainder, how it is divided inside the top k, and inside the remainder. ``weight`` scales the last: 0 asks
    only that the student gives the remainder its whole mass, 1 is the plain KL for every k, as is k = V.

    Raises ArgumentError for k < 1 or a negative weight.
    """
    if k < 1 or weight < 0:
        raise ArgumentError("no such split", found=f"k={k}, weight={weight}", expected="k >= 1, weight >= 0")
    p, q = _log_probabilities(student, teacher, temperature)
    if k >= p.shape[-1]:
        return _mean((p.exp() * (p - q)).sum(-1), keep) * temperature**2
    top = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(k, -1).indices, True)
    inside = torch.where(top, p.exp() * (p - q), 0).sum(-1)
    # logsumexp of the others, not log(1 - mass): exact where the remainder is tiny.
    rest_p, rest_q = (x.masked_fill(top, -torch.inf).logsumexp(-1) for x in (p, q))
    loss = inside + rest_p.exp() * (rest_p - rest_q)
    if weight:
        split = (p - rest_p.unsqueeze(-1)) - (q - rest_q.unsqueeze(-1))
        loss = loss + weight * torch.where(top, 0, p.exp() * split).sum(-1)
    return _mean(loss, keep) * temperature**2


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p of the teacher (no gradient) and log q of the student."""
    if student.shape != teacher.shape:
        raise ArgumentError(
            "student and teacher logits differ in shape",
            found=f"{tuple(student.shape)} and {tuple(teacher.shape)}",
            do="distil between models of one vocabulary, on the same batch",
        )
    if temperature <= 0:
        raise ArgumentError("the temperature is positive", found=str(temperature))
    p = (teacher.detach().float() / temperature).log_softmax(-1)
    return p, (student.float() / temperature).log_softmax(-1)


def _mean(loss: Tensor, keep: Tensor | None) -> Tensor:
    return loss.mean() if keep is None else loss[keep].mean()
