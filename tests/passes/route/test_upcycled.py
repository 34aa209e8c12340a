"""What is done with an upcycled model: save, copy, compile, decode, run twice; and what the report says it costs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gatecc
from gatecc.errors import ArgumentError, ContractError
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.ffn import Stacked
from gatecc.passes.route.route import Route
from gatecc.recipes import samples


def moved(model: nn.Module, dense: nn.Module, scale: float = 0.3) -> nn.Module:
    """The model with noise on what is new, in place."""
    generator = torch.Generator().manual_seed(1)
    known = dict(dense.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in known:
                p.add_(torch.randn(p.shape, generator=generator) * scale)
    return model


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    return samples.language()[0]


IDS = samples.language()[1][0]


@pytest.fixture(scope="module")
def upcycled(dense: nn.Module) -> nn.Module:
    """With experts that differ."""
    return moved(
        gatecc.transform(dense, gatecc.recipe("upcycle", experts=4, k=2, how="gated-shared"), (IDS,), verify=False),
        dense,
    )


def test_saved_loaded_copied_and_run_again_it_is_bitwise_the_same(
    dense: nn.Module, upcycled: nn.Module, tmp_path: Path
) -> None:
    gatecc.save(upcycled, tmp_path)
    loaded = gatecc.load(dense, tmp_path)
    with torch.no_grad():
        expected = upcycled(IDS)
        assert not torch.equal(expected, dense(IDS))
        for again in (upcycled, copy.deepcopy(upcycled), loaded):
            assert torch.equal(again(IDS), expected)
    assert list(loaded.state_dict()) == list(upcycled.state_dict())


def test_gradients_are_bitwise_the_same_twice(upcycled: nn.Module) -> None:
    model = copy.deepcopy(upcycled)
    found: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        model.zero_grad()
        model(IDS).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == len(dict(model.named_parameters()))
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_it_compiles_without_a_break_and_for_any_number_of_tokens(upcycled: nn.Module) -> None:
    graphs: list[Any] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(upcycled, backend=count, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for length in (8, 5, 11, 6):
        ids = torch.randint(0, 32, (2, length), generator=generator)
        with torch.no_grad():
            assert torch.allclose(compiled(ids), upcycled(ids), atol=1e-6)
    assert len(graphs) <= 3  # the first, and two recompiles
    assert any("moe_ffn" in str(node.target) for node in graphs[-1].graph.nodes)


def test_steps_of_its_decoder_are_the_full_forward(upcycled: nn.Module) -> None:
    decoder = gatecc.decoder(upcycled, (IDS,))
    with torch.no_grad():
        expected = upcycled(IDS)
    logits, state = decoder.prefill(IDS[:, :3])
    parts = [logits]
    for at in range(3, IDS.size(1)):
        logits, state = decoder.step(IDS[:, at : at + 1], state)
        parts.append(logits)
    assert float((torch.cat(parts, 1) - expected).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("recipe", "options", "share", "router", "rest"),
    [  # what of the dense MLP runs for a token, logits of a router, and how many parameters stand beside the experts
        ("upcycle", {"experts": 8, "k": 2}, 2, 8, 0),
        ("upcycle", {"experts": 8, "k": 4, "how": "groups"}, 1, 8, 16),
        ("split-experts", {"experts": 8, "k": 2}, 1 / 4, 8, 16),
    ],
)
def test_the_report_counts_what_runs(
    dense: nn.Module, recipe: str, options: dict[str, Any], share: float, router: int, rest: int
) -> None:
    model = gatecc.transform(dense, gatecc.recipe(recipe, **options), (IDS,), verify=False)
    totals = gatecc.last_report(model).totals
    tokens, mlp = IDS.numel(), 2 * 2 * 16 * 32
    assert totals.flops_before is not None
    per_layer = tokens * (mlp * share + 2 * 16 * router - mlp)
    assert totals.flops_after == totals.flops_before + 2 * per_layer
    biases = 32 + (0 if rest else 16)
    active = share * (2 * 16 * 32 + biases) + rest + router * 16
    assert totals.active_after == sum(p.numel() for p in dense.parameters()) + round(
        2 * (active - (2 * 16 * 32 + 32 + 16))
    )


class _Served(TorchDispatchMode):
    """How many slots hold an expert, and what share of them all that is."""

    slots = full = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "moe_ffn" in str(func):
            self.slots += args[2].numel()
            self.full += int((args[2] < args[3].size(0)).sum())
        return func(*args, **(kwargs or {}))


def test_learners_that_a_token_does_not_take_are_no_work_and_masked_is_skipped(dense: nn.Module) -> None:
    model = moved(
        gatecc.transform(dense, gatecc.recipe("acm", learners=4, lead=0.0), (IDS,), verify=False), dense, scale=2.0
    )
    with torch.no_grad(), _Served() as served:
        skipped = model(IDS)
    assert 0.1 < served.full / served.slots < 0.9
    assert served.slots == 2 * IDS.numel() * 4
    with torch.no_grad():
        masked = _all_run(model)
    assert torch.allclose(masked, skipped, atol=1e-5)


def _all_run(model: nn.Module) -> torch.Tensor:
    """The model with every learner at work and the weights of those that are not taken 0, as in training."""

    class Mask(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "moe_ffn" in str(func):
                x, weights, indices, *rest = args
                empty = indices == rest[0].size(0)
                every = torch.arange(indices.size(1)).expand_as(indices)
                args = (x, weights.masked_fill(empty, 0), every, *rest)
            return func(*args, **(kwargs or {}))

    with Mask():
        return model(IDS)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_real_models_start_as_they_were(name: str) -> None:
    model, inputs = _real(name)
    model.eval()
    routed = gatecc.transform(model, gatecc.recipe("upcycle", experts=4, k=4, how="groups"), inputs, verify=False)
    with torch.no_grad():
        before, after = (m(**inputs).logits for m in (model, routed))
    assert float((after - before).norm() / before.norm()) < 3e-7


def _real(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (2, 7))
    from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

    if name == "gpt2":
        config = GPT2Config(
            vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
        )
        return GPT2LMHeadModel(config), {"input_ids": ids}
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids}


def test_in_16_bits_the_promise_is_checked_in_float64() -> None:
    model = samples.language()[0].bfloat16()
    upcycled = gatecc.transform(model, gatecc.recipe("upcycle", experts=4), (IDS,))
    report = gatecc.last_report(upcycled)
    assert report.totals.contract_held
    assert any("no part of the model by more than" in note for note in report.notes)
    assert {p.dtype for p in upcycled.parameters()} == {torch.bfloat16}


class _Wrong(Copies):
    """Experts that are not what they promise, by 1 %."""

    def finish(self, experts: Stacked, dense: Stacked) -> None:
        experts.down.mul_(1.01)


def test_in_16_bits_a_promise_that_is_not_kept_is_seen() -> None:
    route = Route("mlp[...]", RouterSpec(), _Wrong(4))
    with pytest.raises(ContractError, match="outputs differ"):
        gatecc.transform(samples.language()[0].bfloat16(), route, (IDS,))


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"share=0\.3, how='copies'"):
        gatecc.recipe("upcycle", share=0.3)
    with pytest.raises(ArgumentError, match=r"experts=6, k=4"):
        gatecc.recipe("upcycle", experts=6, k=4, how="groups")
    with pytest.raises(ArgumentError, match=r"k=9 of 8"):
        gatecc.recipe("upcycle", k=9)
