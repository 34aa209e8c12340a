"""Routing: who chooses the experts of the mixtures that transformers has, in each of its ways to run them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ir.match.found import Found, find

transformers = pytest.importorskip("transformers")

D, E, K = 16, 4, 2
SIZES: dict[str, Any] = {"hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 12}
SMALL: dict[str, Any] = {"num_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": 8}
GROUPED: dict[str, Any] = {"n_routed_experts": 2 * E, "n_group": 2, "topk_group": 1, "num_experts_per_tok": K}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralSparseMoeBlock", {"num_local_experts": E}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock", SMALL | {"shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", SMALL),
    "olmoe": ("OlmoeConfig", "OlmoeSparseMoeBlock", {"num_experts": E, "num_experts_per_tok": K}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE", GROUPED | {"moe_intermediate_size": 8}),
    "gpt_oss": ("GptOssConfig", "GptOssMLP", {"num_local_experts": E, "num_experts_per_tok": K}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeMoE", {"num_local_experts": E, "num_experts_per_tok": K}),
}
ROUTER = {"gpt_oss": "router", "granitemoe": "router"}  # the others call it gate
X = torch.randn(2, 5, D)


def block(architecture: str, implementation: str) -> Any:
    """The mixture of a layer, with weights that differ from expert to expert."""
    config, cls, options = ARCHITECTURES[architecture]
    modeling = getattr(transformers.models, architecture)
    made = getattr(modeling, config)(**SIZES, **options)
    made._experts_implementation = implementation
    module = __import__(f"transformers.models.{architecture}.modeling_{architecture}", fromlist=[cls])
    mixture = getattr(module, cls)(made).eval()
    torch.manual_seed(0)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixture


def routed(mixture: Any, architecture: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the model's own router yields for the tokens of X."""
    with torch.no_grad():
        return getattr(mixture, ROUTER.get(architecture, "gate"))(X.reshape(-1, D))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_mixtures_of_transformers(architecture: str, implementation: str) -> None:
    mixture = block(architecture, implementation)
    logits, weights, indices = routed(mixture, architecture)
    found = find(mixture, X)
    (site,) = [s for s in found.sites("mlp") if s.form == "experts"]
    assert (site.owner, site.experts, site.chosen) == ("experts", logits.shape[-1], K)
    assert torch.equal(found.value(site, "indices"), indices)
    assert torch.allclose(found.value(site, "router"), logits, atol=1e-6)
    assert torch.allclose(found.value(site, "weights"), weights, atol=1e-6)
    assert found.value(site, "hidden").shape == (10 * K, site_width(mixture))
    assert {"router": "be", "weights": "be", "indices": "be", "hidden": "bc"}.items() <= found.axes(site).items()
    _weights(mixture, found, site, architecture)
    assert mixture.experts.config._experts_implementation == implementation


def site_width(mixture: Any) -> int:
    experts = mixture.experts
    return getattr(experts, "intermediate_dim", None) or experts.intermediate_size


def _weights(mixture: Any, found: Found, site: Any, architecture: str) -> None:
    """The weights of all experts as (experts, out, in), biases, and the router's matrix."""
    experts, width = site.experts, site_width(mixture)
    assert found.matrix(site, "gate_up").shape == (experts, 2 * width, D)
    assert found.matrix(site, "down").shape == (experts, D, width)
    assert found.matrix(site, "router").shape == (experts, D)
    biases = {role: weight.bias for role, weight in site.weights.items()}
    biased = {"gate_up": "experts.gate_up_proj_bias", "down": "experts.down_proj_bias", "router": "router.bias"}
    assert biases == (biased if architecture == "gpt_oss" else dict.fromkeys(biased))


def test_square_matrices_are_told_apart_by_the_products_that_read_them() -> None:
    """gpt-oss multiplies with (in, out): the shapes of square experts would say the same of both."""
    config, cls, options = ARCHITECTURES["gpt_oss"]
    for implementation in ("grouped_mm", "batched_mm"):
        made = getattr(transformers, config)(**SIZES | {"intermediate_size": D // 2}, **options)
        made._experts_implementation = implementation
        module = __import__("transformers.models.gpt_oss.modeling_gpt_oss", fromlist=[cls])
        (site,) = [s for s in find(getattr(module, cls)(made), X).sites("mlp") if s.form == "experts"]
        assert {site.weights[role].orientation for role in ("gate_up", "down")} == {"in_out"}
