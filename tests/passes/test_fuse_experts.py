"""FuseExperts: the experts of transformers as one operator, in every way in which they are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc import MLP
from gatecc.capture import capture
from gatecc.errors import SiteRefusedError
from gatecc.ir.program import Program
from gatecc.passes.fuse_experts import FuseExperts
from gatecc.pipeline import Application, apply, prepare

pytest.importorskip("transformers")

from tests.graphs import run
from tests.ir.match.test_routing import X, block

MIXTURES = (
    *(("mixtral", "grouped_mm"), ("qwen2_moe", "batched_mm"), ("qwen3_moe", "eager"), ("olmoe", "batched_mm")),
    *(("deepseek_v3", "grouped_mm"), ("gpt_oss", "eager"), ("gpt_oss", "batched_mm"), ("granitemoe", "grouped_mm")),
)
LARGE = 4 * X  # beyond the clamps of gpt-oss


def fused(mixture: Any) -> Program:
    """The program of a mixture with the rewrite done."""
    program = capture(mixture, (LARGE,))
    apply(prepare(program), [Application(FuseExperts(MLP[...]), (("experts", 0),))])
    return program


def operators(program: Program) -> list[str]:
    return [str(node.target) for node in program.calls()]


@pytest.mark.parametrize(("architecture", "implementation"), MIXTURES)
def test_the_experts_become_one_operator(architecture: str, implementation: str) -> None:
    mixture = block(architecture, implementation)
    program = fused(mixture)
    (node,) = [n for n in program.calls() if str(n.target) == "gatecc.moe_ffn.default"]
    layout = {"activation": "swiglu(alpha=1.702, limit=7.0)", "layout": "interleaved"}
    assert node.kwargs == (layout if architecture == "gpt_oss" else {})
    assert not any(name in str(operators(program)) for name in ("grouped_mm", "bmm", "sort", "clone", "contiguous"))
    expected, got = mixture(LARGE), run(program)[0]
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (expected - got).abs().max() <= 2e-6 * expected.abs().max()
    _same_gradients(mixture, expected, got)


def _same_gradients(mixture: nn.Module, expected: torch.Tensor, got: torch.Tensor) -> None:
    parameters = dict(mixture.named_parameters())
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), list(parameters.values()), retain_graph=True) for y in (got, expected)
    )
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name


def test_clamps_are_read_from_the_model() -> None:
    mixture = block("gpt_oss", "grouped_mm")
    mixture.experts.alpha, mixture.experts.limit = 1.5, 2.0
    (node,) = [n for n in fused(mixture).calls() if str(n.target) == "gatecc.moe_ffn.default"]
    assert node.kwargs["activation"] == "swiglu(alpha=1.5, limit=2.0)"


def test_other_formulas_are_refused_with_the_nearest() -> None:
    mixture = block("mixtral", "grouped_mm")
    mixture.experts.act_fn = nn.Hardtanh()
    with pytest.raises(SiteRefusedError, match="nearest formula"):
        fused(mixture)


def test_weights_that_meet_the_tokens_first_are_refused() -> None:
    """Llama 4 scales what goes into its experts."""
    mixture = block("mixtral", "batched_mm")
    forward = mixture.experts.forward
    mixture.experts.forward = lambda x, indices, weights: forward(x * weights.sum(-1, True), indices, weights)
    with pytest.raises(SiteRefusedError, match="nearest formula"):
        fused(mixture)


def test_dense_layers_have_no_experts() -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    with pytest.raises(SiteRefusedError, match="which nothing routes"):
        gatecc.transform(dense, FuseExperts(MLP[...]), (torch.randn(2, 3, 4),))


def test_a_gated_mixture_is_made_fast_and_taken_back() -> None:
    mixture = block("gpt_oss", "eager")
    before = {name: p.detach().clone() for name, p in mixture.named_parameters()}
    gated = gatecc.transform(mixture, gatecc.Gate(MLP[...].router, gatecc.GateSpec("in")), (X,))
    fast = gatecc.transform(gated, "fast-experts", (X,))
    assert torch.allclose(fast(X)[0], mixture(X)[0], atol=1e-5)
    afterwards = [pair.after for pair in gatecc.last_report(fast).graphs if pair.after is not None]
    assert "gatecc.moe_ffn.default" in [node.target for graph in afterwards for node in graph.nodes]
    back = gatecc.revert(gatecc.revert(fast))
    assert all(torch.equal(p, before[name]) for name, p in back.named_parameters())


def test_a_gated_gpt_oss_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    mixture = block("gpt_oss", "grouped_mm")
    rewrites = [FuseExperts(MLP[...]), gatecc.Gate(MLP[...].out, gatecc.GateSpec("in", init="random(0.5)"))]
    gated = gatecc.transform(mixture, rewrites, (X,))
    made = gatecc.export(gated, tmp_path / "out", (X,))
    assert max(c.error for c in made.compared) <= 2e-6
    assert made.operators["Gemm"] >= 2 * mixture.experts.num_experts
    assert not [name for name in made.operators if "::" in name]
