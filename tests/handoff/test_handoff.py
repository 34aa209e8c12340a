"""Hand-off: what is written is the class of transformers that computes the same, or nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import gatecc
from gatecc.errors import ArgumentError, HandoffError, UnsupportedModelError
from gatecc.handoff import HandedOff

transformers: Any = pytest.importorskip("transformers")

IDS = torch.randint(29, (2, 9), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
MORE: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}


def noisy(model: Any) -> Any:
    """Experts that differ, gates that are not at their start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@cache
def rewritten(architecture: str, recipe: str, options: tuple[tuple[str, Any], ...] = (), **config: Any) -> Any:
    """A small model of an architecture, rewritten, with noise on all of its weights."""
    made = getattr(transformers, f"{architecture}Config")(**SIZES, **MORE, **config)
    model = getattr(transformers, f"{architecture}ForCausalLM")(made).eval()
    return noisy(gatecc.transform(model, gatecc.recipe(recipe, **dict(options)), {"input_ids": IDS}, verify=False))


def upcycled(architecture: str = "Llama", config: dict[str, Any] | None = None, **options: Any) -> Any:
    return rewritten(architecture, "upcycle", tuple({"experts": 4, **options}.items()), **(config or {}))


def hand(model: Any, folder: Path, **options: Any) -> tuple[HandedOff, Any]:
    """What was written, and the model that transformers makes of it."""
    found = gatecc.to_transformers(model, folder, **options)
    return found, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def same(model: Any, again: Any) -> None:
    """Logits, with and without padding, and greedy decoding with the KV cache of either."""
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    for kwargs in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            ours, theirs = (m(IDS, **kwargs).logits[mask.bool()] for m in (model, again))
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max().clamp_min(1)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(*(m.generate(IDS, **options) for m in (model, again)))


@pytest.mark.broad(2)
@pytest.mark.parametrize(
    ("architecture", "options", "written"),
    [
        ("Llama", {"k": 2}, "MixtralForCausalLM"),
        ("Mistral", {"k": 1}, "MixtralForCausalLM"),
        ("Llama", {"k": 2, "how": "gated-shared"}, "Qwen2MoeForCausalLM"),
        ("Llama", {"k": 1, "how": "shared", "sites": "mlp[model.layers.1.*]"}, "Qwen2MoeForCausalLM"),
        ("Qwen2", {"k": 2}, "Qwen2MoeForCausalLM"),  # biases of queries, keys and values
        ("Qwen3", {"k": 2, "sites": "mlp[model.layers.0.*]"}, "Qwen3MoeForCausalLM"),
        ("Olmo2", {"k": 2}, "FlexOlmoForCausalLM"),  # queries and keys normalised over their full width
    ],
)
def test_upcycled_models_are_mixtures_of_transformers(
    architecture: str, options: dict[str, Any], written: str, tmp_path: Path
) -> None:
    model = upcycled(architecture, **options)
    found, again = hand(model, tmp_path / "x")
    assert (found.architecture, type(again).__name__, found.generates) == (written, written, True)
    assert found.error <= 1e-5
    same(model, again)


def test_gated_attention_is_that_of_qwen3_next(tmp_path: Path) -> None:
    """One matrix yields query and gate in turn; norms hold what is added to 1; 2 sigma is in the output projection."""
    model = rewritten("Qwen3", "gated-attention", (("granularity", "element"),), head_dim=8)
    found, again = hand(model, tmp_path / "x")
    assert found.architecture == "Qwen3NextForCausalLM"
    same(model, again)


def test_gates_and_experts_are_a_mixture_of_qwen3_next(tmp_path: Path) -> None:
    """Its layers have experts beside gated attention; one is dense, and one without a gate."""
    gates = gatecc.recipe("gated-attention", granularity="element", sites="attention[model.layers.0.*]")
    experts = gatecc.recipe("upcycle", experts=4, k=2, sites="mlp[model.layers.1.*]")
    dense = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **MORE, head_dim=8)).eval()
    model = noisy(gatecc.transform(dense, [*gates.rewrites, *experts.rewrites], {"input_ids": IDS}, verify=False))
    found, again = hand(model, tmp_path / "x")
    assert (found.architecture, again.config.mlp_only_layers) == ("Qwen3NextForCausalLM", [0])
    same(model, again)


def test_gated_delta_rules_are_the_linear_layers_of_qwen3_next(tmp_path: Path) -> None:
    """Its rule runs in chunks of 64 tokens. The attention that is kept has no gate: half of twice its heads."""
    dense = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **MORE, head_dim=8)).eval()
    delta = gatecc.recipe("gated-delta-net", form="qwen3-next", keep="1")
    model = noisy(gatecc.transform(dense, delta, {"input_ids": IDS}, verify=False))
    found, again = hand(model, tmp_path / "x")
    assert (found.architecture, found.generates) == ("Qwen3NextForCausalLM", True)
    assert again.config.layer_types == ["linear_attention", "full_attention"]
    ids = torch.randint(29, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours, theirs = (m(ids, use_cache=False).logits for m in (model, again))
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max().clamp_min(1)


def sigmoid(architecture: str, choice: str, experts: str, sites: str = "mlp[...]", **config: Any) -> Any:
    """Experts that a sigmoid chooses."""
    from gatecc.passes.route.route import Route

    made = getattr(transformers, f"{architecture}Config")(**SIZES, **MORE, **config)
    dense = getattr(transformers, f"{architecture}ForCausalLM")(made).eval()
    route = Route(gatecc.Selector.parse(sites), f"in, linear(bias=False), {choice}", experts)
    model = noisy(gatecc.transform(dense, route, {"input_ids": IDS}, verify=False))
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, buffer.numel()).roll(3))
    return model


@pytest.mark.parametrize(
    ("architecture", "choice", "experts", "sites", "shared"),
    [
        ("Llama", "sigmoid_topk(3, groups=3, limit=2, bias=True, scale=1.5)", "shared(split(6))", "mlp[...]", 6),
        ("Qwen3", "sigmoid_topk(2, renorm=False)", "copies(4)", "mlp[model.layers.1.*]", 1),  # a shared one of zeros
    ],
)
def test_experts_of_a_sigmoid_are_those_of_glm(
    architecture: str, choice: str, experts: str, sites: str, shared: int, tmp_path: Path
) -> None:
    model = sigmoid(architecture, choice, experts, sites)
    found, again = hand(model, tmp_path / "x")
    assert (found.architecture, again.config.n_shared_experts) == ("Glm4MoeForCausalLM", shared)
    same(model, again)


def test_sliding_windows_that_twelve_tokens_do_not_show(tmp_path: Path) -> None:
    """They are compared by configuration: kept where the class has them, and refused where it has none."""
    config = {"sliding_window": 48}
    _, again = hand(upcycled("Mistral", config, k=2, how="gated-shared"), tmp_path / "x")
    assert again.config.layer_types == ["sliding_attention"] * 2
    assert [layer.self_attn.sliding_window for layer in again.model.layers] == [48, 48]
    with pytest.raises(HandoffError, match=r"no sliding window, the model's layers have \[48, 48\]"):
        hand(upcycled("Mistral", config, k=2, scores="sigmoid"), tmp_path / "y")


def test_parts_of_a_layer_that_all_run_are_a_mixture(tmp_path: Path) -> None:
    model = rewritten("Llama", "split-experts", (("experts", 3),))
    found, again = hand(model, tmp_path / "x")
    assert (again.config.num_local_experts, again.config.num_experts_per_tok) == (3, 3)
    assert found.architecture == "MixtralForCausalLM"
    same(model, again)


@pytest.mark.parametrize(
    ("model", "target", "reason"),
    [
        (lambda: upcycled(k=2, how="gated-shared"), "mixtral", "no shared expert"),
        (lambda: upcycled(k=1, how="shared", sites="mlp[model.layers.1.*]"), "mixtral", "none in layer 0"),
        (lambda: upcycled("Qwen2", k=2), "mixtral", "it has no model.layers.0.self_attn.k_proj.bias"),
        (lambda: upcycled(config={"mlp_bias": True}, k=2), None, "with biases"),
        (lambda: upcycled(k=2), "qwen3_moe", "the model has no .*k_norm"),
        (lambda: upcycled(k=2), "olmoe", "over their full width"),
        (lambda: upcycled(k=2), "deepseek_v3", "latent"),
        (lambda: upcycled(k=2), "glm4_moe", "by a sigmoid, the model by a softmax"),
        (lambda: sigmoid("Llama", "sigmoid_topk(2)", "shared(copies(4), gated=True)"), None, "no gate"),
        (lambda: sigmoid("Llama", "sigmoid_topk(2)", "copies(4)", "mlp[model.layers.0.*]"), None, "the first ones"),
        (lambda: rewritten("Llama", "split-experts", (("experts", 3), ("k", 2))), None, "unweighted"),
        (lambda: rewritten("Llama", "value-gate"), None, "gate"),
    ],
)
def test_what_no_architecture_computes_is_refused(model: Any, target: str | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match=reason):
        gatecc.to_transformers(model(), tmp_path / "x", target=target)
    assert not list(tmp_path.iterdir())


def test_weights_that_mixtral_would_divide_by_their_sum(tmp_path: Path) -> None:
    """Qwen2-MoE has them as they are."""
    from gatecc.passes.route.copies import Copies
    from gatecc.passes.route.route import Route

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **MORE)).eval()
    route = Route(gatecc.MLP[...], "in, linear(bias=False), softmax_topk(2, renorm=False)", Copies(4))
    model = noisy(gatecc.transform(model, route, {"input_ids": IDS}, verify=False))
    with pytest.raises(HandoffError, match="divided by their sum"):
        gatecc.to_transformers(model, tmp_path / "x", target="mixtral")
    found, again = hand(model, tmp_path / "x")
    assert (found.architecture, again.config.norm_topk_prob) == ("Qwen2MoeForCausalLM", False)
    same(model, again)


def test_outputs_that_differ_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture that is described wrongly is found out."""
    from gatecc.handoff.targets.mixtral import Mixtral

    right = Mixtral.state
    monkeypatch.setattr(Mixtral, "state", lambda self, s: {n: x.flip(0) for n, x in right(self, s).items()})
    with pytest.raises(HandoffError, match=r"mixtral: its outputs differ by"):
        gatecc.to_transformers(upcycled(k=2), tmp_path / "x", target="mixtral")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    model = upcycled(k=2)
    with pytest.raises(ArgumentError, match="mixtral"):
        gatecc.to_transformers(model, tmp_path / "x", target="mixtrall")
    with pytest.raises(UnsupportedModelError):
        gatecc.to_transformers(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(HandoffError, match="save_pretrained"):
        gatecc.to_transformers(gatecc.revert(model), tmp_path / "x")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(HandoffError, match="not empty"):
        gatecc.to_transformers(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes"]
