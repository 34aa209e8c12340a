"""A readout in the place of a head, and weights of conditions; the expected values by hooks with the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gatecc
from gatecc.errors import GateccError, SiteRefusedError
from gatecc.recipes import streams
from tests.recipes.checks import gradients, new_parameters, randomise, reverted
from tests.recipes.replaced import gap
from tests.recipes.test_fusions import hooked

# --- brain-readout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["timm/vit", "timm/resnet18"])
def test_queries_of_regions_read_tokens_and_maps(family: str) -> None:
    timm: Any = pytest.importorskip("timm")
    torch.manual_seed(0)
    if family == "timm/vit":
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        plain = timm.create_model("vit_tiny_patch16_224", num_classes=6, **sizes).eval()
        features, place = "block[-1].out", "blocks.1"
    else:
        plain, features = timm.create_model("resnet18", num_classes=6).eval(), "activation[-1].out"
        place = "layer4"
    x = torch.randn(2, 3, 64, 64) if place == "layer4" else torch.randn(2, 3, 32, 32)
    recipe = gatecc.recipe("brain-readout", regions=2, features=features)
    model: Any = gatecc.transform(plain, recipe, (x,))
    new = new_parameters(model, plain)
    seen: list[Tensor] = []
    with hooked((plain.get_submodule(place), lambda m, a, o: seen.append(o))):
        dense = plain(x)
    rows = seen[0] if seen[0].dim() == 3 else seen[0].flatten(2).mT
    query, weight, bias = (next(p for n, p in new.items() if n.endswith(end)) for end in ("query", "weight", "bias"))
    assert not query.any()
    with torch.no_grad():
        mean = torch.einsum("bc,rkc->brk", rows.mean(1), weight).flatten(1) + bias
        assert gap(mean, model(x)) <= 1e-5
        randomise(new.values(), 0.3)
        a = torch.einsum("rc,bnc->brn", query, rows * rows.size(-1) ** -0.5).softmax(-1)
        read = torch.einsum("brn,bnc->brc", a, rows)
        expected = torch.stack([read[:, r] @ weight[r].T for r in range(2)], 1).flatten(1) + bias
        assert gap(expected, model(x)) <= 1e-4
    count = sum(p.numel() for p in new.values())
    assert count == (6 + 2) * rows.size(-1) + 6
    assert count < rows[0].numel() * 6 / 2
    gradients(model, new, model(x))
    assert all(p.grad is None for n, p in model.named_parameters() if n not in new)
    reverted(model, plain, (x,))
    assert dense.shape == model(x).shape


def test_outputs_that_do_not_split_are_refused() -> None:
    plain, inputs = streams.classifier()
    with pytest.raises(SiteRefusedError, match="as many outputs for each region"):
        gatecc.transform(plain, gatecc.recipe("brain-readout", regions=4), inputs)


# --- guess ------------------------------------------------------------------------------------------------------------


def _conditioned(family: str) -> tuple[Any, dict[str, Tensor], str]:
    """A model that reads two kinds of tokens in one row, and what reads that row first."""
    hf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ids = torch.randint(1, 33, (2, 5))
    if family == "visual_bert":
        plain = hf.VisualBertModel(hf.VisualBertConfig(vocab_size=33, visual_embedding_dim=12, **shape))
        return plain.eval(), {"input_ids": ids, "visual_embeds": torch.randn(2, 3, 12)}, "embeddings.LayerNorm"
    vision = hf.GitVisionConfig(image_size=8, patch_size=4, **shape)
    plain = hf.GitModel(hf.GitConfig(vision_config=vision.to_dict(), vocab_size=33, use_cache=False, **shape))
    return plain.eval(), {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8)}, "encoder.layer.0"


@pytest.mark.parametrize(("family", "sites"), [("visual_bert", "merge[embeddings]"), ("git", "merge[0]")])
def test_guess_scales_the_tokens_of_each_condition(family: str, sites: str) -> None:
    plain, inputs, first = _conditioned(family)
    model: Any = gatecc.transform(plain, gatecc.recipe("guess", sites=sites, time="pool(in0)", width=8), inputs)
    with torch.no_grad():
        assert gap(plain(**inputs), model(**inputs)) == 0
    new = {n.rsplit(".", 1)[1]: p for n, p in new_parameters(model, plain).items()}
    randomise(new.values(), 0.5)
    seen: list[Tensor] = []

    def scaled(module: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        parts = x.split((5, 3) if family == "visual_bert" else (5, 5), 1)
        read = torch.cat([parts[i].mean(1) for i in (0, 0, 1)], -1)
        hidden = F.relu(read @ new["hidden_weight"].T + new["hidden_bias"])
        w = 2 * torch.sigmoid(hidden @ new["weight"].T + new["bias"])
        seen.append(w)
        return (torch.cat([w[:, i, None, None] * part for i, part in enumerate(parts)], 1), *args[1:]), kwargs

    handle = plain.get_submodule(first).register_forward_pre_hook(scaled, with_kwargs=True)
    with torch.no_grad():
        expected = plain(**inputs)
        handle.remove()
        assert float(seen[0].std()) > 0.1
        assert gap(expected, model(**inputs)) <= 1e-4


def test_only_parts_of_a_join_are_scaled_in_their_places() -> None:
    plain, inputs = streams.motion()
    for options, match in (
        ({"conditions": "in0,out"}, "only what a concatenation of tokens reads"),
        ({"conditions": "in0,in7"}, "needs 'in7'"),
        ({"time": "in0"}, "other tokens|lacks|only what a concatenation"),
    ):
        given = {"sites": "merge[0]", "time": 'at("linear[time].out")'} | options
        with pytest.raises(GateccError, match=match):
            gatecc.transform(plain, gatecc.recipe("guess", **given), inputs)
