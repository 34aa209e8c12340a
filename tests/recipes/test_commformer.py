"""CommFormer: each row of the table keeps its best, and the temporal gate takes a message or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.edges import Adjacency, Edges, straight_through
from gatecc.recipes import samples
from tests.graphs import attention, done
from tests.recipes.checks import case, new_parameters, randomise, reverted

STEPS = 150


def test_the_equation() -> None:
    result = done(attention(), AttentionEdit("attention[...]", Edges(0.5), label="edges"))
    module, v = result.program.module, result.values
    table = module.get_parameter("att.edges.edges")
    torch.nn.init.normal_(table)
    n = table.size(0)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in sorted(range(n), key=lambda j: -float(table[i, j]))[: max(1, n // 2)]:
            seen[i, j] = True
    scores = v["qh"] @ v["kr"].mT / 2**0.5
    heads = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v["vr"]
    expected = heads.transpose(1, 2).flatten(2) @ module.get_parameter("att.o.weight").T
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_rows_have_k_edges_straight_through(training: bool) -> None:
    torch.manual_seed(0)
    edges = Adjacency(10, 0.4, 0.5).train(training)
    torch.nn.init.normal_(edges.edges)
    found = edges(torch.zeros(()))
    added, chosen = found if training else (found, None)
    assert added.shape == (1, 1, 10, 10)
    kept = added[0, 0] == 0
    assert kept.sum(-1).tolist() == [4] * 10
    assert bool((added[0, 0][~kept] == -torch.inf).all())
    if chosen is None:
        chosen = added.masked_fill(~kept, 0.0)
    else:
        assert torch.equal(chosen[0, 0].detach() > 0.5, kept)
    (chosen * kept).sum().backward()
    assert edges.edges.grad is not None
    assert bool(edges.edges.grad.isfinite().all())
    if not training:  # of sum over the kept of softmax(e / T)
        table = edges.edges.detach().clone().requires_grad_()
        (torch.softmax(table / 0.5, -1) * kept).sum().backward()
        assert torch.allclose(edges.edges.grad, table.grad, atol=1e-6)  # pyright: ignore[reportArgumentType]
    else:  # noise chooses otherwise, until it is turned off
        best = {tuple(row) for row in edges.edges.topk(4).indices.sort(-1).values.tolist()}
        assert {tuple(row.nonzero().flatten().tolist()) for row in kept} != best
        edges.noise.zero_()
        exact = edges(torch.zeros(()))[0][0, 0] == 0
        assert {tuple(row.nonzero().flatten().tolist()) for row in exact} == best


def test_an_edge_that_is_not_kept_learns_what_it_would_change() -> None:
    """Its gradient is the change of the loss if it came (1st order in the loss), and bi-level training finds whom an
    agent needs to hear, with one edge each."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64).float().unbind()
    kept = torch.eye(4, dtype=torch.bool)
    mask = torch.zeros(1, 1, 4, 4).masked_fill(~kept, -torch.inf)
    chosen = kept.float()[None, None].requires_grad_()
    weight = torch.randn(1, 1, 4, 4)
    (straight_through(q, k, v, mask, chosen, 0.5) * weight).sum().backward()

    def value(mask: torch.Tensor) -> torch.Tensor:
        return ((0.5 * q @ k.mT + mask).softmax(-1) @ v * weight).sum()

    for i, j in ((0, 1), (3, 0), (2, 3)):
        other = mask.clone()
        other[0, 0, i, j] = 0
        assert chosen.grad is not None
        assert torch.allclose(chosen.grad[0, 0, i, j], value(other) - value(mask), atol=1e-5)
    n = 4  # whole part of 0.2 n is 0: each agent hears one
    plain = torch.nn.TransformerEncoderLayer(8, 1, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = gatecc.transform(plain, gatecc.recipe("commformer", share=0.2), (torch.randn(32, n, 8),), verify=False)
    table = [p for name, p in model.named_parameters() if name.endswith("edges.edges")]
    rest = [p for name, p in model.named_parameters() if not name.endswith("edges.edges")]
    lower, upper = torch.optim.Adam(rest, 1e-2), torch.optim.Adam(table, 5e-2)
    (noise,) = [b for name, b in model.named_buffers() if name.endswith("edges.noise")]
    wanted = [1, 2, 3, 0]
    model.train()
    for step in range(STEPS):
        noise.fill_(float(step < 0.7 * STEPS))  # late in training the choice is exact
        for optimizer in (lower, upper):
            x = torch.randn(32, n, 8)
            model.zero_grad()
            (model(x)[..., :4] - x[:, wanted, :4]).square().mean().backward()
            optimizer.step()
    assert table[0].argmax(-1).tolist() == wanted


@pytest.mark.parametrize("name", ["timm/vit-sdpa", "torch/encoder"])
def test_agents_that_are_not_heard_have_no_part(name: str) -> None:
    known = case(name)
    full = gatecc.transform(known.model, gatecc.recipe("commformer", share=1.0), known.inputs)
    assert new_parameters(full, known.model)
    model: Any = gatecc.transform(known.model, gatecc.recipe("commformer", share=0.3), known.inputs, verify=False)
    randomise(p for n, p in new_parameters(model, known.model).items() if n.endswith("edges"))
    with torch.no_grad():
        assert not torch.allclose(
            model(*known.args, **known.kwargs), known.model(*known.args, **known.kwargs), atol=1e-5
        )
    reverted(model, known.model, known.args, known.kwargs)


def test_a_closed_gate_takes_no_message() -> None:
    plain, inputs = samples.sequences()
    model: Any = gatecc.transform(plain, gatecc.recipe("commformer"), inputs, verify=False)
    for block in model.blocks:
        torch.nn.init.constant_(block.attn.receives.bias, -1.0)
    other = torch.cat([inputs[0][:, :1], torch.randn_like(inputs[0][:, 1:])], 1)
    with torch.no_grad():
        assert torch.equal(model(*inputs)[:, 0], model(other)[:, 0])
        for block in model.blocks:
            torch.nn.init.constant_(block.attn.receives.bias, 1.0)
            block.attn.edges.edges.copy_(torch.eye(6).flip(-1))  # the first hears the last first
        assert not torch.equal(model(*inputs)[:, 0], model(other)[:, 0])


def test_what_does_not_fit() -> None:
    plain, inputs = samples.language()
    with pytest.raises(SiteRefusedError, match="the mask is causal"):
        gatecc.transform(plain, gatecc.recipe("commformer"), inputs)
    plain, inputs = samples.sequences()
    model = gatecc.transform(plain, gatecc.recipe("commformer"), inputs, verify=False)
    with pytest.raises(SiteRefusedError, match="6, for which the edges are"):
        model(torch.randn(2, 7, 16))
