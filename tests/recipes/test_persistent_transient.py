"""A transient child beside persistent parents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.recipes import samples
from tests.recipes.checks import new_parameters, randomise


def series() -> tuple[Any, Any, str]:
    model, inputs = samples.series()
    return model, inputs, "rnn[...].out"


def gpt2() -> tuple[Any, Any, str]:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    return transformers.GPT2Model(config).eval(), {"input_ids": torch.randint(0, 32, (2, 7))}, "mlp[...].out"


def vit() -> tuple[Any, Any, str]:
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    return model, (torch.randn(2, 3, 16, 16),), "mlp[...].out"


def call(model: Any, inputs: Any) -> Tensor:
    out = model(**inputs, use_cache=False) if isinstance(inputs, dict) else model(*inputs)
    return out if isinstance(out, Tensor) else out.last_hidden_state


class Beside(nn.Module):
    """A parent with a child that is run by hand, sample by sample and step by step."""

    def __init__(self, parent: nn.Module, child: Any) -> None:
        super().__init__()
        self.parent, self.child, self.on = parent, child, 0

    def forward(self, x: Tensor) -> Any:
        found = self.parent(x)
        y = found[0] if isinstance(found, tuple) else found
        c, added = self.child, torch.zeros_like(y)
        cell = nn.GRUCell(x.size(-1), c.w_state.size(1))
        with torch.no_grad():
            for p, q in zip(cell.parameters(), (c.w_in, c.w_state, c.b_in, c.b_state), strict=True):
                p.copy_(q)
            for b in range(x.size(0)):
                h = torch.zeros(c.w_state.size(1))
                for t in range(x.size(1)):
                    on = torch.sigmoid(c.switch(x[b, t])) > 0.5
                    h = cell(x[b, t], h) if on else torch.zeros_like(h)
                    added[b, t] = c.out(h) * on
                    self.on += int(on)
        return (y + added, *found[1:]) if isinstance(found, tuple) else y + added


@pytest.mark.parametrize("family", [series, gpt2, vit])
@torch.no_grad()
def test_the_child_runs_while_its_switch_is_on(family: Any) -> None:
    plain, inputs, sites = family()
    model = gatecc.transform(plain, gatecc.recipe("persistent-transient", sites=sites, hidden=6), inputs, verify=False)
    assert torch.equal(call(model, inputs), call(plain, inputs))  # U starts at 0
    new = new_parameters(model, plain)
    randomise(new.values(), 0.5)
    path = next(name for name in new if name.endswith("switch.bias")).rpartition(".switch")[0]
    got, (_, ran) = call(model, inputs), counted(lambda: call(model, inputs))
    owner = path.rpartition(".")[0]
    holder, _, name = owner.rpartition(".")
    cell: Any = model.get_submodule(path)
    beside = Beside(plain.get_submodule(owner), cell)
    setattr(plain.get_submodule(holder), name, beside)
    assert torch.allclose(got, call(plain, inputs), atol=1e-5)
    parent = family()[0]
    cell.switch.bias.fill_(-1e9)  # a probability of exactly 0
    assert torch.equal(call(model, inputs), call(parent, inputs))  # the parent alone, exactly
    _, off = counted(lambda: call(model, inputs))
    assert beside.on > 0
    assert ran - off == beside.on * 2 * (cell.w_in.numel() + cell.w_state.numel())  # what ran is what was on
