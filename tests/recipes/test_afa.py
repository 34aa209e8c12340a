"""AFA: models of one architecture that go on from one mixture of their features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from tests.recipes.checks import gradients, new_parameters, randomise, reverted
from tests.recipes.replaced import gap


class Mean(nn.Module):
    """The mean of what models return."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        each: list[Any] = [model(x) for model in self.models]
        return torch.stack([y if isinstance(y, Tensor) else y[0] for y in each]).mean(0)


def _convnext(seed: int) -> nn.Module:
    timm: Any = pytest.importorskip("timm.models.convnext")
    torch.manual_seed(seed)
    return timm.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4, ls_init_value=None).eval()


PLACES = ("stages.0.blocks.0", "stages.2.blocks.0")
FEATURES = ";".join(f"residual[{{}}.{place}].out" for place in PLACES)


def test_features_of_three_models_are_mixed_at_each_pixel() -> None:
    plain, x = Mean(*map(_convnext, range(3))).eval(), torch.randn(2, 3, 32, 32)
    recipe = gatecc.recipe("afa", models="models.0,models.1,models.2", features=FEATURES)
    model: Any = gatecc.transform(plain, recipe, (x,))
    new = new_parameters(model, plain)
    randomise(new.values(), 0.2)
    maps = [model.models[0].get_submodule(place).map for place in PLACES]
    states: list[Any] = [x] * 3
    stages = [("stem", "stages.0"), ("stages.1", "stages.2"), ("stages.3", "norm_pre", "head")]
    with torch.no_grad():
        for number, stage in enumerate(stages):
            for m, net in enumerate(plain.models):
                for name in stage:
                    states[m] = net.get_submodule(name)(states[m])
            if number == 2:
                break
            z = F.conv2d(torch.cat(states, 1), maps[number].weight.view(3, -1, 3, 3), maps[number].bias, padding=1)
            w = z.softmax(1)
            assert float(w.std()) > 0.01
            states = [sum(w[:, m : m + 1] * states[m] for m in range(3))] * 3
        assert gap(torch.stack(states).mean(0), model(x)) <= 1e-4
    gradients(model, new, model(x))
    reverted(model, plain, (x,))


@pytest.mark.broad(2)
@pytest.mark.parametrize("picked", [0, 1])
def test_a_map_that_is_one_hot_is_that_model_exactly(picked: int) -> None:
    hf: Any = pytest.importorskip("transformers")
    config = hf.MobileNetV1Config(image_size=32, depth_multiplier=0.25, num_labels=4)
    models: list[Any] = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(hf.MobileNetV1Model(config).eval())
        randomise(models[-1].parameters(), 0.3)
    plain, x = Mean(*models).eval(), torch.randn(2, 3, 32, 32)
    features = "activation[{}.layer.1.activation].out;activation[{}.layer.25.activation].out"
    model: Any = gatecc.transform(plain, gatecc.recipe("afa", models="models.0,models.1", features=features), (x,))
    with torch.no_grad():
        for name, p in new_parameters(model, plain).items():
            if name.endswith("bias"):
                p[picked] = 200.0
        assert torch.equal(models[picked](x)[0], model(x))


def test_what_cannot_be_mixed_is_refused() -> None:
    plain, x = Mean(_convnext(0), _convnext(1)).eval(), torch.randn(2, 3, 32, 32)
    for models, features in (("models.0", FEATURES), ("models.0,models.1", "residual[models.0.stages.0.blocks.0].out")):
        with pytest.raises(ArgumentError, match="several models are mixed"):
            gatecc.recipe("afa", models=models, features=features)
    apart = gatecc.recipe("afa", models="models.0.stages.1,models.1.stages.2", features="residual[{}.blocks.0].out")
    with pytest.raises(SiteRefusedError, match="other shapes"):
        gatecc.transform(plain, apart, (x,))
