"""Unlasting: outputs that a net of its own says are silent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.engine.contracts import compare
from tests.recipes.checks import agree, case, new_parameters, randomise, reverted

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(8))


def test_silent_outputs_are_0_and_the_others_as_they_were() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 7)).eval()

    class Genes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = plain[:2], plain[2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(x))

    genes = Genes().eval()
    model: Any = gatecc.transform(genes, gatecc.recipe("unlasting-mask", scorer="mlp(5)"), (X,), verify=False)
    assert agree(model, genes, X) == 0, "every output is on"
    new = new_parameters(model, genes)
    randomise(new.values())
    own = {name.rpartition(".")[2]: p for name, p in new.items()}
    h = genes.net(X)
    inner = torch.relu(h @ own["hidden_weight"].T + own["hidden_bias"])
    silent = 1 - torch.sigmoid(inner @ own["weight"].T + own["bias"])
    assert 0.1 < float((silent < 0.5).float().mean()) < 0.9
    assert torch.allclose(model(X), genes(X) * (silent < 0.5), atol=1e-6)
    model.train()
    model(X).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in new.values())
    reverted(model, genes, (X,))


@pytest.mark.broad(2)
@pytest.mark.parametrize("name", ["torchvision/resnet18", "hf/gpt2-eager"])
def test_real_models(name: str) -> None:
    known = case(name)
    model = gatecc.transform(known.model, gatecc.recipe("unlasting-mask"), known.inputs)
    assert compare(known.model(*known.args, **known.kwargs), model(*known.args, **known.kwargs)) <= 1e-6
    randomise(new_parameters(model, known.model).values())
    out: Any = model(*known.args, **known.kwargs)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    assert 0.1 < float((logits == 0).float().mean()) < 0.9
    reverted(model, known.model, known.inputs.args, known.inputs.kwargs)
