"""Recipes that read a text, distances or other series; the expected values by hooks with the papers' equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.recipes import samples, streams
from tests.recipes.checks import gradients, new_parameters, randomise, reverted
from tests.recipes.replaced import gap, vit
from tests.recipes.test_fusions import hooked


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


# --- dvla-rl ----------------------------------------------------------------------------------------------------------


class WithText(nn.Module):
    """An encoder of images of a library, and a text beside them: (B, 3, 32, 32), (B, M, 8)."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        y: Any = self.encoder(image)
        return y if isinstance(y, Tensor) else y[0]


def _images(family: str) -> nn.Module:
    if family == "timm":
        return WithText(vit()).eval()
    hf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **shape), add_pooling_layer=False)
    randomise(model.parameters(), 0.3)
    return WithText(model).eval()


@pytest.mark.parametrize("family", ["timm", "hf"])
@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
def test_a_policy_decides_between_the_image_and_the_text(family: str, estimator: str) -> None:
    plain = _images(family)
    inputs = torch.randn(4, 3, 32, 32), torch.randn(4, 5, 8)
    recipe = gatecc.recipe("dvla-rl", width=6, estimator=estimator, bias=40.0)
    model: Any = gatecc.transform(plain, recipe, inputs)
    with torch.no_grad():
        assert gap(plain(*inputs), model(*inputs)) == 0
    new = new_parameters(model, plain)
    randomise(new.values(), 0.5)
    owner = next(n for n, m in model.named_modules() if hasattr(m, "policy"))
    attention = model.get_submodule(owner)
    shares: list[Tensor] = []

    def decided(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        h = args[0] if args else kwargs["hidden_states"]
        own, cross, policy = out if isinstance(out, Tensor) else out[0], attention.cross, attention.policy
        q, k, v = (_split(p(x), 4) for p, x in ((cross.q, h), (cross.k, inputs[1]), (cross.v, inputs[1])))
        text = cross.out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        state = torch.cat([h.mean(1), inputs[1].mean(1)], -1)
        hidden = F.relu(state @ policy.hidden_weight.T + policy.hidden_bias)
        p = torch.sigmoid(hidden @ policy.weight.T + policy.bias).unsqueeze(-1)
        p = (p > 0.5).float() if estimator == "reinforce" else p
        shares.append(p)
        y = p * own + (1 - p) * text
        return y if isinstance(out, Tensor) else (y, *out[1:])

    handle = plain.get_submodule(owner).register_forward_hook(decided, with_kwargs=True)
    with torch.no_grad():
        for bias in (0.1, 60.0, -60.0):
            attention.policy.bias.fill_(bias)
            assert gap(plain(*inputs), model(*inputs)) <= 1e-4
    handle.remove()
    assert len({float(p) for share in shares for p in share.flatten()}) > 1
    if estimator == "exact":
        gradients(model, new, model(*inputs))
    reverted(model, plain, inputs)


def test_heads_that_do_not_divide_and_texts_that_are_not_there_are_refused() -> None:
    plain, (x, others) = samples.conditioned()
    for options, match in (
        ({"heads": 5}, "heads do not divide"),
        ({"text": "cond(caption)"}, "no input 'caption'"),
        ({"mask": "padding"}, "no input 'padding'"),
    ):
        with pytest.raises(SiteRefusedError, match=match):
            gatecc.transform(plain, gatecc.recipe("dvla-rl", **options), (x, others))


# --- rrnco ------------------------------------------------------------------------------------------------------------


class Cities(nn.Module):
    """An encoder of transformers over points, which are given with their distances: (B, N, 2), (B, N, N)."""

    def __init__(self, family: str) -> None:
        super().__init__()
        hf: Any = pytest.importorskip("transformers")
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        self.embed = nn.Linear(2, 16)
        shape |= {"embedding_size": 16} if family == "Electra" else {}
        config: Any = getattr(hf, f"{family}Config")(vocab_size=9, **shape)
        self.encoder = getattr(hf, f"{family}Model")(config)

    def forward(self, points: Tensor, distance: Tensor) -> Tensor:
        return self.encoder(inputs_embeds=self.embed(points))[0]


@pytest.mark.parametrize("family", ["Bert", "Electra"])
def test_coordinates_and_distances_are_fused(family: str) -> None:
    plain: Any = Cities(family).eval()
    points = torch.rand(2, 7, 2)
    inputs = points, torch.cdist(points, points) * (1 + torch.rand(2, 7, 7))
    recipe = gatecc.recipe("rrnco", sites="linear[embed]", k=3, hidden=5, attention="")
    model: Any = gatecc.transform(plain, recipe, inputs)
    new = new_parameters(model, plain)
    randomise(new.values(), 0.5)
    near, gate = model.embed.distances.embed, model.embed.distance_gate

    def fused(module: Any, args: Any, c: Tensor) -> Tensor:
        ordered = torch.stack([row.sort().values[1:4] for row in inputs[1].flatten(0, 1)]).view(2, 7, 3)
        d = ordered @ near.weight.T + near.bias
        hidden = F.relu(torch.cat([c, d], -1) @ gate.hidden_weight.T + gate.hidden_bias)
        g = torch.sigmoid(hidden @ gate.weight.T + gate.bias)
        return g * c + (1 - g) * d

    with hooked((plain.embed, fused)):
        expected = plain(*inputs)
    with torch.no_grad():
        assert gap(expected, model(*inputs)) <= 1e-5
        gate.bias.fill_(60.0)
        assert gap(plain(*inputs), model(*inputs)) <= 1e-5  # coordinates only
    gate.bias.data.zero_()
    gradients(model, new, model(*inputs))
    reverted(model, plain, inputs)


def test_distances_between_other_tokens_are_refused() -> None:
    plain, (points, distance) = streams.routing()
    for options in ({"k": 6}, {"distance": "points", "k": 3}):
        with pytest.raises(SiteRefusedError, match="not those between the tokens"):
            gatecc.transform(plain, gatecc.recipe("rrnco", attention="", **options), (points, distance))


# --- tsmixer ----------------------------------------------------------------------------------------------------------


def _forecaster(family: str) -> nn.Module:
    hf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"context_length": 32, "patch_length": 8, "patch_stride": 8, "num_input_channels": 3, "d_model": 8}
    if family == "PatchTSMixer":
        config = hf.PatchTSMixerConfig(num_layers=2, prediction_length=4, gated_attn=False, **shape)
        return hf.PatchTSMixerForPrediction(config).eval()
    config = hf.PatchTSTConfig(
        num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, prediction_length=4, scaling=None, **shape
    )
    return hf.PatchTSTForPrediction(config).eval()


@pytest.mark.parametrize(
    ("family", "blocks", "mlp"),
    [
        ("PatchTSMixer", "model.encoder.mlp_mixer_encoder.mixers", "feature_mixer.mlp"),
        ("PatchTST", "model.encoder.layers", "ff"),
    ],
)
def test_series_read_each_other_and_forecasts_are_reconciled(family: str, blocks: str, mlp: str) -> None:
    plain: Any = _forecaster(family)
    x = torch.randn(2, 32, 3)
    options = {
        "mlps": f"mlp[*.{mlp}]",
        "blocks": "block[0]",
        "forecasts": "model[...].prediction_outputs",
        "width": 5,
        "context": 1,
    }
    recipe = gatecc.recipe("tsmixer", **options)
    model: Any = gatecc.transform(plain, recipe, {"past_values": x})
    with torch.no_grad():
        before = plain(past_values=x).prediction_outputs
        assert gap(before, model(past_values=x).prediction_outputs) <= 1e-6
    new = new_parameters(model, plain)
    randomise(new.values(), 0.3)
    before_and_after = list(zip(plain.get_submodule(blocks), model.get_submodule(blocks), strict=True))
    place, layer = before_and_after[0]

    def gated(gate: Any) -> Any:
        def hook(module: Any, args: Any, out: Tensor) -> Tensor:
            return out * out.size(-1) * (out @ gate.weight.T + gate.bias).softmax(-1)

        return hook

    def across(module: Any, args: Any, out: Any) -> Any:
        h, a = out if isinstance(out, Tensor) else out[0], layer.across
        y = F.layer_norm(h, (8,), a.norm.weight, a.norm.bias)
        y = torch.einsum("bspc,ws->bwpc", y, a.up.weight) + a.up.bias[:, None, None]
        y = torch.einsum("bwpc,sw->bspc", F.gelu(y), a.down.weight) + a.down.bias[:, None, None]
        y = h + y * 8 * (y @ a.gate.weight.T + a.gate.bias).softmax(-1)
        return y if isinstance(out, Tensor) else (y, *out[1:])

    hooks: list[Any] = []
    for one, other in before_and_after:
        held = other.get_submodule(mlp)
        hooks.append((one.get_submodule(mlp), gated(held.gate if hasattr(held, "gate") else other.gate)))
    with hooked((place, across), *hooks):
        y = plain(past_values=x).prediction_outputs
    head = model.reconcile
    with torch.no_grad():
        padded = F.pad(y, (0, 0, 1, 1))
        expected = torch.empty_like(y)
        for t in range(y.size(1)):
            h = padded[:, t : t + 3].flatten(1)
            a = h.size(-1) * (h @ head.gate.weight.T + head.gate.bias).softmax(-1)
            expected[:, t] = y[:, t] + (a * h) @ head.out.weight.T + head.out.bias
        assert gap(expected, model(past_values=x).prediction_outputs) <= 1e-4
    gradients(model, new, model(past_values=x).prediction_outputs)
    back = gatecc.revert(model)
    with torch.no_grad():
        assert torch.equal(back(past_values=x).prediction_outputs, before)


def test_axes_that_are_not_there_and_other_numbers_of_series_are_refused() -> None:
    plain, inputs = streams.forecasts()
    model = gatecc.transform(plain, gatecc.recipe("tsmixer"), inputs)
    with pytest.raises(gatecc.GateccError), torch.no_grad():
        model(torch.randn(2, 4, 4, 16))
    for options, match in (
        ({"axis": "t"}, "needs the axis"),
        ({"forecasts": "block[0].out"}, "reconciled over time and series"),
    ):
        with pytest.raises(SiteRefusedError, match=match):
            gatecc.transform(plain, gatecc.recipe("tsmixer", **options), inputs)
