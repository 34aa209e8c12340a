"""Experts, gates, linear attention and LoRA, two at a time: saved and loaded, decoded, compiled, exported.

Each pair either works or is refused by name, in one transform and in two. What takes seconds, compiling and exporting,
is done on the model with all four, in which every pair stands, and on the pair that once failed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import GraphError
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.low_rank import Lora

IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
PARTS: dict[str, Callable[[], tuple[Rewrite, ...]]] = {
    "route": lambda: gatecc.recipe("upcycle", experts=4, k=2).rewrites,
    "linear": lambda: gatecc.recipe("gla").rewrites,
    "gate": lambda: gatecc.recipe("gated-attention").rewrites,
    "lora": lambda: (Branch(Selector.parse('linear["*q_proj","*v_proj"].out'), Lora(4), label="lora"),),
}
PAIRS = list(combinations(PARTS, 2))  # linear attention comes before the gate: it would take the gated value away


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval()


def inputs() -> dict[str, Any]:
    return {"input_ids": IDS, "use_cache": False}


def logits(model: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny Llama with both parts, whose new parameters matter."""
    return rewritten(request.param)


@pytest.fixture(scope="module", params=[("route", "linear"), tuple(PARTS)], ids="-".join)
def some(request: pytest.FixtureRequest) -> nn.Module:
    """The same with several parts."""
    return rewritten(request.param)


def rewritten(parts: Sequence[str]) -> nn.Module:
    dense = llama()
    model = gatecc.transform(dense, [rewrite for part in parts for rewrite in PARTS[part]()], inputs(), verify=False)
    known, generator = dict(dense.named_parameters()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in known:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def test_refuses_a_gate_on_what_goes() -> None:
    with pytest.raises(GraphError, match=r"gate\.bias, gate\.weight no longer takes part"):
        gatecc.transform(llama(), [*PARTS["gate"](), *PARTS["linear"]()], inputs(), verify=False)


def test_both_parts_act(pair: nn.Module) -> None:
    assert float((logits(pair) - logits(llama())).abs().max()) > 1e-3


def test_in_two_transforms_is_the_same(pair: nn.Module, request: pytest.FixtureRequest) -> None:
    one, other = request.node.callspec.params["pair"]
    twice = gatecc.transform(llama(), PARTS[one](), inputs(), verify=False)
    twice = gatecc.transform(twice, PARTS[other](), inputs(), verify=False)
    assert set(twice.state_dict()) == set(pair.state_dict())
    twice.load_state_dict(pair.state_dict())
    torch.testing.assert_close(logits(twice), logits(pair), atol=1e-6, rtol=1e-6)


def test_loads_what_it_saved(pair: nn.Module, tmp_path: Path) -> None:
    gatecc.save(pair, tmp_path / "saved")
    assert torch.equal(logits(gatecc.load(llama(), tmp_path / "saved")), logits(pair))


def test_decodes(pair: nn.Module) -> None:
    decoder = gatecc.decoder(pair, inputs())
    first, state = decoder.prefill(IDS[:, :4])
    parts = [first]
    for at in range(4, IDS.size(1)):
        step, state = decoder.step(IDS[:, at : at + 1], state)
        parts.append(step)
    torch.testing.assert_close(torch.cat(parts, 1), logits(pair), atol=1e-5, rtol=1e-5)


@pytest.mark.broad(2)
def test_compiles(some: nn.Module) -> None:
    compiled = torch.compile(some, backend="gatecc", fullgraph=True, mode="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(some), atol=1e-5, rtol=1e-5)


@pytest.mark.broad(2)
def test_exports(some: nn.Module, tmp_path: Path) -> None:
    made = gatecc.export(some, tmp_path / "out", inputs())
    assert made.compared
    assert max(c.error for c in made.compared) < 1e-4
