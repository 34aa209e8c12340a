"""A model with its rewrites as one graph: also where these have changed, widened or taken out weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gatecc
from gatecc.engine.whole import whole_program
from tests.recipes.tiny import tiny

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("gated-attention", {"init": "identity(how=fold)"}),
        ("gated-attention", {"fuse_into": "q"}),
        ("upcycle", {"experts": 3, "k": 2}),
        ("gla", {}),
    ],
)
def test_the_whole_graph_is_the_model(recipe: str, options: dict[str, Any]) -> None:
    model = gatecc.transform(tiny(layers=2, causal=True), gatecc.recipe(recipe, **options), (X,), verify=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("gate", "router", "experts")):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        weights = {name: p.clone() for name, p in model.state_dict().items()}
        program = whole_program(model, (X,), {})
        leaves = [X for _ in program.placeholders]
        found: Any = torch.fx.Interpreter(_runnable(program.graph_module, model)).run(*leaves)
        expected = model(X)
    first = next(x for x in pytree.tree_leaves(found) if isinstance(x, torch.Tensor))
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(after[name], t) for name, t in weights.items())


def _runnable(graph_module: nn.Module, model: nn.Module) -> torch.fx.GraphModule:
    """The graph on the weights that the model has now."""
    graph: Any = graph_module.graph
    return torch.fx.GraphModule(model, graph)
