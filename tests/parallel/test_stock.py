"""Experts that a model of transformers has: one call shards them, whatever their `experts_implementation` is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load

import gatecc
from gatecc.errors import ArgumentError
from gatecc.parallel import expert_parallel
from gatecc.parallel.stock import experts, formula
from tests.parallel.stock_worker import ARCHITECTURES, IDS, mixture, trained
from tests.parallel.test_experts import Ranks3
from tests.parallel.worker import upcycled

Ranks = list[dict[str, Any]]


@pytest.mark.parametrize("name", [*ARCHITECTURES, "fast-experts"])
def test_the_same_as_one_process(name: str, ranks: Ranks) -> None:
    """Logits and gradients of experts, which are sums over all rows; of one process in transformers' own dispatch."""
    right = trained(mixture("Mixtral" if name == "fast-experts" else name), IDS)
    for rank, found in enumerate(ranks):
        got = found["stock"][name]
        expected = right["logits"].chunk(len(ranks))[rank]
        assert (got["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()
        banks = {n: g for n, g in right["grads"].items() if ".experts." in n}
        assert len(banks) == (4 if name == "GptOss" else 2)
        for n, g in banks.items():
            assert (got["grads"][n] - g).abs().max() <= 1e-5 * g.abs().max(), n


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_weights_and_tokens_stay(name: str, ranks: Ranks) -> None:
    model = mixture(name)
    tokens = model.generate(IDS, max_new_tokens=3, do_sample=False).chunk(len(ranks))
    for rank, found in enumerate(ranks):
        state = found["stock"][f"{name} state"]
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
        assert torch.equal(found["stock"][f"{name} tokens"], tokens[rank])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_operator_is_every_implementation(name: str, implementation: str) -> None:
    model = mixture(name)
    model.set_experts_implementation(implementation)
    block = next(m for n, m in model.named_modules() if n.endswith("experts"))
    x, weights = torch.randn(9, 16) * 3, torch.rand(9, 2)
    indices = torch.randint(4, (9, 2))
    indices[:, 1] = (indices[:, 0] + 1) % 4
    with torch.no_grad():
        torch.testing.assert_close(
            experts(block, x, indices, weights), block(x, indices, weights), rtol=1e-5, atol=1e-4
        )


def test_experts_that_compute_something_else() -> None:
    model = mixture("Mixtral")
    block = next(m for n, m in model.named_modules() if n.endswith("experts"))
    block.act_fn = torch.nn.Softsign()
    with pytest.raises(ArgumentError, match=r"(?s)not what one operator computes.*leave this module out"):
        formula(block, "model.layers.0.mlp.experts")


def test_a_graph_that_dispatches_by_itself() -> None:
    """Gates inside the experts keep the dispatch of transformers in a graph, where nothing could be exchanged."""
    gated = gatecc.transform(
        mixture("Mixtral"), gatecc.Gate(gatecc.MLP[...].hidden, gatecc.GateSpec("hidden")), {"input_ids": IDS}
    )
    two: Any = Ranks3()
    two.size = lambda axis=0: 2
    with pytest.raises(ArgumentError, match=r"(?s)dispatches tokens to these experts.*fast-experts"):
        expert_parallel(gated, two)


def test_a_checkpoint_of_two_ranks_is_read_by_one(ranks: Ranks) -> None:
    """torch.distributed.checkpoint: saved as shards of experts and of all else, loaded whole."""
    right, model = upcycled().state_dict(), upcycled()
    state = {"model": {n: torch.zeros_like(t) for n, t in right.items()}}
    load(state, checkpoint_id=str(Path(ranks[0]["folder"]) / "kept"), no_dist=True)
    model.load_state_dict(state["model"])
    assert all(torch.equal(model.state_dict()[n], t) for n, t in right.items())
