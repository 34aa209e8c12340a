"""The workspace of a controller that calls blocks, and blocks that are recurrent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ops.paths import watched


def vit() -> tuple[Any, Any, Any]:
    timm: Any = pytest.importorskip("timm")
    sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    return model, (torch.randn(3, 3, 16, 16),), model.blocks


def bert() -> tuple[Any, Any, Any]:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=16)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return model, {"input_ids": torch.randint(0, 32, (3, 5))}, model.encoder.layer


def call(model: Any, inputs: Any) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return out if isinstance(out, Tensor) else out.last_hidden_state


@pytest.mark.parametrize("family", [vit, bert])
def test_a_one_hot_script_runs_its_chain_and_nothing_else(family: Any) -> None:
    torch.manual_seed(0)
    plain, inputs, blocks = family()
    model = gatecc.transform(plain, "global-workspace", inputs, verify=False)
    assert torch.equal(call(model, inputs), call(plain, inputs))  # the model's own chain, bitwise
    script = next(p for n, p in model.named_parameters() if n.endswith("controller.script"))
    with torch.no_grad():
        script.copy_(9 * torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    ran: list[int] = []
    with watched(lambda taken, _: ran.append(taken.counts[0])):
        got = call(model, inputs)
    assert ran == [0, 3, 0, 3]
    got.square().sum().backward()
    kept = [blocks[0], blocks[1]]
    name = next(n for n, m in plain.named_modules() if m is kept[0])
    assert all(p.grad is None for p in model.get_submodule(name).parameters())  # nothing of the block ran
    assert script.grad is not None
    assert script.grad.ne(0).any()  # the controller learns through what was taken
    blocks[0] = kept[1]
    assert torch.allclose(got, call(plain, inputs), atol=1e-6)


def test_a_soft_controller_is_the_weighted_sum() -> None:
    torch.manual_seed(0)
    plain, inputs, blocks = vit()
    model = gatecc.transform(plain, gatecc.recipe("global-workspace", hard=False, steps=1), inputs, verify=False)
    expected = torch.tensor([4.0, 0.0]).softmax(0)

    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([blocks[0], blocks[1]])

        def forward(self, x: Tensor) -> Tensor:
            return expected[0] * self.blocks[0](x) + expected[1] * self.blocks[1](x)

    plain.blocks = nn.Sequential(Soft())
    assert torch.allclose(call(model, inputs), call(plain, inputs), atol=1e-5)


def test_what_is_no_chain() -> None:
    alone = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises((SiteRefusedError, gatecc.GateccError)):
        gatecc.transform(alone, "global-workspace", (torch.randn(2, 4),))
    with pytest.raises(ArgumentError, match="calls nothing"):
        gatecc.recipe("global-workspace", steps=-1)


@pytest.mark.parametrize("family", [vit, bert])
def test_blocks_are_recurrent(family: Any) -> None:
    torch.manual_seed(0)
    plain, inputs, blocks = family()
    recipe = gatecc.recipe("deconstructing", join="additive", recurrence=3)
    model = gatecc.transform(plain, recipe, inputs, verify=False)
    got = call(model, inputs)
    assert (
        gatecc.recipe("deconstructing", join="additive").rewrites
        == gatecc.recipe("residual-gates", join="additive").rewrites
    )
    again = [blocks[0]] * 3 + [blocks[1]] * 3
    blocks.__dict__["_modules"].clear()
    for i, block in enumerate(again):
        blocks.add_module(str(i), block)
    assert torch.allclose(got, call(plain, inputs), atol=1e-5)
