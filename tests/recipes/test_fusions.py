"""Recipes of fusions on models of libraries; the expected values by hooks that write the papers' equations down."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import EmptySelectionError, SiteRefusedError
from gatecc.recipes import streams
from tests.recipes.checks import case, gradients, new_parameters, randomise, reverted
from tests.recipes.replaced import gap


@contextmanager
def hooked(*pairs: tuple[nn.Module, Any]) -> Generator[None]:
    """Hooks that see (module, inputs, output) and may return another output."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


def _moved(plain: nn.Module, recipe: Any, inputs: Any) -> Any:
    """Transformed, with new parameters that matter, gradients in each, and reverted bitwise."""
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    model = gatecc.transform(plain, recipe, inputs)
    new = new_parameters(model, plain)
    randomise(new.values(), 0.3)
    gradients(model, new, model(*args, **kwargs))
    reverted(model, plain, args, kwargs)
    return model


# --- gman, sttn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layers", "attention", "mlp"),
    [("hf/gptj-eager", "transformer.h", "attn", "mlp"), ("hf/phi-sdpa", "model.layers", "self_attn", "mlp")],
)
def test_gman_fuses_parallel_branches(name: str, layers: str, attention: str, mlp: str) -> None:
    known = case(name)
    recipe = gatecc.recipe("gman")
    model: Any = gatecc.transform(known.model, recipe, known.inputs)
    randomise(new_parameters(model, known.model).values(), 0.3)
    pairs: list[tuple[nn.Module, Any]] = []
    before: Any = known.model.get_submodule(layers)
    for plain, gated in zip(before, model.get_submodule(layers), strict=True):
        kept: dict[str, Tensor] = {}

        def keep(module: Any, args: Any, out: Any, kept: Any = kept) -> None:
            kept["attention"] = out[0]

        def fuse(module: Any, args: Any, out: Tensor, kept: Any = kept, gate: Any = gated.fusion_gate) -> Tensor:
            s, t = kept["attention"], out
            z = torch.sigmoid(torch.cat([s, t], -1) @ gate.weight.T + gate.bias)
            return z * s + (1 - z) * t - s  # the model adds s

        pairs += [(plain.get_submodule(attention), keep), (plain.get_submodule(mlp), fuse)]
    with hooked(*pairs):
        expected = known.model(*known.args, **known.kwargs)
    with torch.no_grad():
        assert gap(expected, model(*known.args, **known.kwargs)) <= 1e-4


@pytest.mark.parametrize("bias", [-60.0, 60.0])
def test_a_bias_picks_one_branch_and_the_layers_that_follow_are_two(bias: float) -> None:
    plain, inputs = streams.parallel()
    model: Any = gatecc.transform(plain, gatecc.recipe("gman", width=8), inputs)
    with torch.no_grad():
        for block in model.blocks:
            block.fusion_gate.bias.fill_(bias)
    pairs: list[tuple[nn.Module, Any]] = []
    for block, gated in zip(plain.get_submodule("blocks"), model.blocks, strict=True):  # pyright: ignore[reportArgumentType]
        layers = gated.adapter

        def taken(
            module: Any, args: Any, out: Tensor, layers: Any = layers, first: bool = bias > 0, of: Any = block
        ) -> Tensor:
            x = args[0]
            part = of.attn(of.norm(x)) if first else of.mlp(of.norm(x))
            return x + F.relu(part @ layers.down.T) @ layers.up.T

        pairs.append((block, taken))
    with hooked(*pairs):
        expected = plain(*inputs)
    with torch.no_grad():
        assert gap(expected, model(*inputs)) <= 1e-5


class WithGraph(nn.Module):
    """An encoder of a library whose tokens are the nodes of a graph, which is given beside them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, adjacency: Tensor) -> Tensor:
        return self.encoder(ids)[0]


@pytest.mark.parametrize(
    ("name", "attentions"),
    [("hf/bert-sdpa", "encoder.layer.{}.attention"), ("hf/electra-sdpa", "encoder.layer.{}.attention")],
)
def test_sttn_fuses_attention_with_a_convolution_over_the_graph(name: str, attentions: str) -> None:
    known = case(name)
    plain = WithGraph(getattr(known.model, "base_model", known.model)).eval()
    ids = torch.randint(1, 30, (2, 6))
    edges = torch.rand(2, 6, 6) * (torch.rand(2, 6, 6) > 0.4)
    edges[0, 3] = 0  # a node without neighbours
    recipe = gatecc.recipe("sttn", sites="attention[0]")
    model = _moved(plain, recipe, (ids, edges))
    layer: Any = plain.encoder.get_submodule(attentions.format(0))
    new = {n.rsplit("graph", 1)[1]: p for n, p in new_parameters(model, plain).items()}
    assert sorted(new) == [".weight.bias", ".weight.weight", "_gate.bias", "_gate.weight"]

    def fused(module: Any, args: Any, out: Tensor) -> Tensor:
        x = seen[0]
        mean = edges / edges.sum(-1, keepdim=True).clamp_min(1e-30)
        graph = F.relu(torch.cat([x, mean @ x], -1) @ new[".weight.weight"].T + new[".weight.bias"])
        g = torch.sigmoid(torch.cat([out, graph], -1) @ new["_gate.weight"].T + new["_gate.bias"])
        return g * out + (1 - g) * graph

    seen: list[Tensor] = []
    with hooked((layer.self, lambda m, a, o: seen.append(a[0])), (layer.output.dense, fused)):
        expected = plain(ids, edges)
    with torch.no_grad():
        assert gap(expected, model(ids, edges)) <= 1e-4


def test_a_graph_of_other_nodes_is_refused() -> None:
    plain, (x, _) = streams.nodes()
    with pytest.raises(SiteRefusedError, match="does not have the tokens"):
        gatecc.transform(plain, gatecc.recipe("sttn"), (x, torch.rand(5, 5)))
    with pytest.raises(SiteRefusedError, match="no input 'edges'"):
        gatecc.transform(plain, gatecc.recipe("sttn", adjacency="edges"), (x, torch.rand(6, 6)))


# --- bi-hierarchical, planet-edg --------------------------------------------------------------------------------------


class Proteins(nn.Module):
    """A sequence encoder and a structure encoder of transformers, of different widths, over the same residues."""

    def __init__(self) -> None:
        super().__init__()
        hf: Any = pytest.importorskip("transformers")
        torch.manual_seed(0)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 33}
        esm = hf.EsmConfig(hidden_size=16, intermediate_size=24, pad_token_id=1, **shape)
        bert = hf.BertConfig(hidden_size=12, intermediate_size=20, **shape)
        self.sequence = hf.EsmModel(esm, add_pooling_layer=False)
        self.structure = hf.BertModel(bert, add_pooling_layer=False)

    def forward(self, residues: Tensor, angles: Tensor) -> Tensor:
        return torch.cat([self.sequence(residues)[0].mean(1), self.structure(angles)[0].mean(1)], -1)


BOTH = {"sequence": "block[sequence.*].out", "structure": "block[structure.*].out"}


@pytest.mark.broad(3)
@pytest.mark.parametrize("how", ["token", "mean", "attention"])
def test_both_encoders_take_from_each_other_what_they_were(how: str) -> None:
    plain = Proteins().eval()
    lengths = (7, 7) if how == "token" else (7, 5)
    inputs = tuple(torch.randint(4, 33, (2, n)) for n in lengths)
    recipe = gatecc.recipe("bi-hierarchical", **BOTH, how=how)
    model: Any = gatecc.transform(plain, recipe, inputs)
    with torch.no_grad():
        assert gap(plain(*inputs), model(*inputs)) == 0
    new = new_parameters(model, plain)
    randomise(new.values(), 0.3)
    gradients(model, new, model(*inputs))

    def modules(layer: int, stream: str) -> dict[str, nn.Module]:
        holder = model.get_submodule(f"{stream}.encoder.layer.{layer}")
        return {n.removeprefix("exchange_"): m for n, m in holder.named_children() if n.startswith("exchange")}

    def taken(own: Tensor, other: Tensor, made: dict[str, Any]) -> Tensor:
        message = other
        if how == "mean":
            message = other.mean(1, keepdim=True).expand(-1, own.size(1), -1)
        elif how == "attention":
            a, split = made["attention"], lambda t: t.unflatten(-1, (4, -1)).transpose(1, 2)
            q, k, v = split(own @ a.q.weight.T), split(other @ a.k.weight.T), split(other @ a.v.weight.T)
            weights = (q @ k.mT * q.size(-1) ** -0.5).softmax(-1)
            message = (weights @ v).transpose(1, 2).flatten(2) @ a.out.weight.T
        g = torch.sigmoid(torch.cat([own, message], -1) @ made["gate"].weight.T + made["gate"].bias)
        return own + g * (message @ made["up"].weight.T)

    with torch.no_grad():
        a, b = plain.sequence.embeddings(inputs[0]), plain.structure.embeddings(inputs[1])
        for layer in range(2):
            a, b = plain.sequence.encoder.layer[layer](a), plain.structure.encoder.layer[layer](b)
            a, b = (x if isinstance(x, Tensor) else x[0] for x in (a, b))
            a, b = taken(a, b, modules(layer, "sequence")), taken(b, a, modules(layer, "structure"))
        expected = torch.cat([plain.sequence.encoder.emb_layer_norm_after(a).mean(1), b.mean(1)], -1)
        assert gap(expected, model(*inputs)) <= 1e-5
    reverted(model, plain, inputs)


class Captions(nn.Module):
    """timm's vision transformer and GPT-2 side by side: two encoders of other authors and other lengths."""

    def __init__(self) -> None:
        super().__init__()
        timm, hf = pytest.importorskip("timm"), pytest.importorskip("transformers")
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
        self.image: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
        config = hf.GPT2Config(vocab_size=33, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False)
        self.text: Any = hf.GPT2Model(config)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return torch.cat([self.image(image), self.text(text)[0].mean(1)], -1)


def test_encoders_of_two_libraries_and_lengths() -> None:
    """Bi-hierarchical exchange by means, and PLANET's context, of a vision transformer of timm and a GPT-2."""
    plain = Captions().eval()
    inputs = (torch.randn(2, 3, 16, 16), torch.randint(0, 33, (2, 7)))
    options: Any = {"sequence": "block[image.blocks.*].out", "structure": "block[text.h.*].out", "how": "mean"}
    model = _moved(plain, gatecc.recipe("bi-hierarchical", **options), inputs)
    mine, vit, gpt = new_parameters(model, plain), plain.image, plain.text

    def taken(own: Tensor, other: Tensor, at: str) -> Tensor:
        gate, up = ({n: mine[f"{at}.exchange_{part}.{n}"] for n in names} for part, names in _EXCHANGE)
        message = other.mean(1, keepdim=True).expand(-1, own.size(1), -1)
        g = torch.sigmoid(torch.cat([own, message], -1) @ gate["weight"].T + gate["bias"])
        return own + g * (message @ up["weight"].T)

    with torch.no_grad():
        a = vit.norm_pre(vit._pos_embed(vit.patch_embed(inputs[0])))
        b = gpt.wte(inputs[1]) + gpt.wpe(torch.arange(7))
        for i in range(2):
            a, b = vit.blocks[i](a), gpt.h[i](b)
            b = b if isinstance(b, Tensor) else b[0]
            a, b = taken(a, b, f"image.blocks.{i}"), taken(b, a, f"text.h.{i}")
        expected = torch.cat([vit.forward_head(vit.norm(a)), gpt.ln_f(b).mean(1)], -1)
        assert gap(expected, model(*inputs)) <= 1e-5
    options = {"sites": "block[text.h.*].out", "context": 'at("block[image.blocks.*].out")'}
    model = _moved(plain, gatecc.recipe("planet-edg", **options), inputs)
    with torch.no_grad():
        a = vit.norm_pre(vit._pos_embed(vit.patch_embed(inputs[0])))
        b = gpt.wte(inputs[1]) + gpt.wpe(torch.arange(7))
        for i in range(2):
            a, b, made = vit.blocks[i](a), gpt.h[i](b), model.get_submodule(f"text.h.{i}")
            b = _with_context(b if isinstance(b, Tensor) else b[0], a, made.cross, made.context_gate)
        expected = torch.cat([vit.forward_head(vit.norm(a)), gpt.ln_f(b).mean(1)], -1)
        assert gap(expected, model(*inputs)) <= 1e-5


_EXCHANGE = (("gate", ("weight", "bias")), ("up", ("weight",)))


def _with_context(h: Tensor, c: Tensor, cross: Any, gate: Any) -> Tensor:
    """h + sigmoid(W [h; c]) c, of the attention of h over the other modality, with four heads."""
    q, k, v = (p(t).unflatten(-1, (4, -1)).transpose(1, 2) for p, t in ((cross.q, h), (cross.k, c), (cross.v, c)))
    weights = (q @ k.mT * q.size(-1) ** -0.5).softmax(-1)
    c = cross.out((weights @ v).transpose(1, 2).flatten(2))
    return h + torch.sigmoid(gate_of(gate, torch.cat([h, c], -1))) * c


def test_streams_that_do_not_fit_are_refused() -> None:
    plain = Proteins().eval()
    inputs = tuple(torch.randint(4, 33, (2, n)) for n in (7, 5))
    for options, error, match in (
        (BOTH, SiteRefusedError, "count other tokens"),
        (BOTH | {"structure": "block[structure.encoder.layer.0].out"}, SiteRefusedError, "not of one depth"),
        (BOTH | {"structure": BOTH["sequence"]}, SiteRefusedError, "exchanges with itself"),
        (BOTH | {"structure": "block[attic.*].out"}, EmptySelectionError, "attic"),
        (BOTH | {"how": "attention", "heads": 5}, SiteRefusedError, "heads do not divide"),
    ):
        with pytest.raises(error, match=match):
            gatecc.transform(plain, gatecc.recipe("bi-hierarchical", **options), inputs)


def test_planet_takes_context_through_a_gate_and_the_nearest_entry() -> None:
    hf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    layer = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    text = hf.CLIPTextConfig(vocab_size=33, **layer, eos_token_id=32)
    vision = hf.CLIPVisionConfig(image_size=8, patch_size=4, **layer)
    config = hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    plain = hf.CLIPModel(config).eval()
    inputs = {"input_ids": torch.randint(3, 33, (2, 6)), "pixel_values": torch.randn(2, 3, 8, 8)}
    options = {"sites": "residual[text_model.*].out", "context": 'at("residual[vision_model.*].out")', "entries": 5}
    model: Any = gatecc.transform(plain, gatecc.recipe("planet-edg", **options), inputs)
    randomise(new_parameters(model, plain).values(), 0.4)
    made, other = model.text_model.encoder.layers[0], plain.vision_model.encoder.layers[0]
    seen: list[Any] = []

    def context(h: Tensor, c: Tensor, number: str) -> Tensor:
        cross, gate, book = (getattr(made, name + number) for name in ("cross", "context_gate", "codebook"))
        h = _with_context(h, c, cross, gate)
        return book.codes[torch.cdist(h, book.codes).argmin(-1)]

    with hooked((other.mlp, lambda m, a, o: seen.append(o)), (other, lambda m, a, o: seen.append(o))):
        plain(**inputs)
    after_mlp, out = (x[0] if isinstance(x, tuple) else x for x in seen)
    steps = {"self_attn": out - after_mlp, "mlp": out}

    layer0 = plain.text_model.encoder.layers[0]
    with torch.no_grad():
        taken: list[Tensor] = []
        with hooked((layer0.layer_norm1, lambda m, a, o: taken.append(a[0]))):
            plain(**inputs)
        x = taken[0]
        x = context(x + _attended(layer0, x), steps["self_attn"], "")
        expected = context(x + layer0.mlp(layer0.layer_norm2(x)), steps["mlp"], "_1")
        got: list[Tensor] = []
        with hooked((model.text_model.final_layer_norm, lambda m, a, o: got.append(a[0]))):
            model(**inputs)
    assert gap(expected, got[0]) <= 1e-5


def gate_of(gate: Any, x: Tensor) -> Tensor:
    """W x + b of a gate."""
    return x @ gate.weight.T + gate.bias


def _attended(layer: Any, x: Tensor) -> Tensor:
    """Causal attention of a CLIP layer, by hand."""
    y, a = layer.layer_norm1(x), layer.self_attn
    q, k, v = (p(y).unflatten(-1, (2, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
    keep = torch.ones(x.size(1), x.size(1), dtype=torch.bool).tril()
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~keep, float("-inf"))
    return a.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_a_codebook_passes_gradients_straight_through_and_learns_from_its_losses() -> None:
    plain, inputs = streams.two()
    options = {
        "sites": "residual[sequence.1].out",
        "context": 'at("residual[structure.1].out")',
        "entries": 5,
        "beta": 0.5,
    }
    model: Any = gatecc.transform(plain, gatecc.recipe("planet-edg", **options), inputs).train()
    codes = model.sequence[1].codebook.codes
    h = torch.zeros(())
    out = model(*inputs)
    weights = torch.randn_like(out[..., :16])
    (out[..., :16] * weights).sum().backward()
    with torch.no_grad():
        h = plain(*inputs)[..., :16]
        nearest = torch.cdist(h, codes).argmin(-1)
        expected = torch.zeros_like(codes)
        expected.index_add_(0, nearest.flatten(), (2 * (codes[nearest] - h) / h.numel()).flatten(0, 1))
    assert torch.allclose(out[..., :16], codes[nearest], atol=1e-6)
    assert torch.allclose(codes.grad, expected, atol=1e-6)
    bias = model.sequence[1].down.bias.grad
    commitment = 0.5 * 2 * (h - codes[nearest]) / h.numel()
    assert torch.allclose(bias, (weights + commitment).sum((0, 1)), atol=1e-5)
