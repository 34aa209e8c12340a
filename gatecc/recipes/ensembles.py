"""Ensembles: small ones that recipes are checked on, each with its example inputs. Plain torch, random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatecc.passes.ensemble.build import ensemble
from gatecc.recipes.samples import weighted

Sample = tuple[nn.Module, tuple[Tensor, ...]]
_WIDTH, _CLASSES = 8, 5


class _Wide(nn.Module):
    """x: (B, 8) -> (B, 5)"""

    def __init__(self, hidden: int, out: int = _CLASSES) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(_WIDTH, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class _Fusion(nn.Module):
    """The outputs of two members -> (B, 5)"""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.Linear(2 * _CLASSES, _CLASSES)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        return self.mixed(torch.cat([text, image], -1))


def _rows() -> Tensor:
    return torch.randn(6, _WIDTH, generator=torch.Generator().manual_seed(2))


def classifiers() -> Sample:
    """Two classifiers of different sizes."""
    members = {"large": _Wide(32), "small": nn.Linear(_WIDTH, _CLASSES)}
    return weighted(ensemble(members, (_rows(),))), (_rows(),)


def experts_of_classes() -> Sample:
    """Two classifiers that return probabilities, of the classes 0 to 2 and of 3 and 4."""
    heads = {"seen": nn.Softmax(-1), "unseen": nn.Softmax(-1)}
    made = ensemble({"seen": _Wide(16), "unseen": _Wide(16)}, (_rows(),), project=heads)
    return weighted(made), (_rows(),)


def with_fusion() -> Sample:
    """Two classifiers, and a third that reads the outputs of both."""
    members = {"text": _Wide(16), "image": _Wide(12), "fusion": _Fusion()}
    reads = {"fusion": {"text": "text", "image": "image"}}
    return weighted(ensemble(members, (_rows(),), inputs=reads)), (_rows(),)


def spaces() -> Sample:
    """Two encoders whose embeddings are brought to one width."""
    members = {"one": _Wide(16, 6), "other": _Wide(16, 12)}
    projectors = {"other": nn.Linear(12, 6)}
    return weighted(ensemble(members, (_rows(),), project=projectors)), (_rows(),)
