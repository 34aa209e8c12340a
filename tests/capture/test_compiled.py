"""Compiled modules: the model behind is rewritten and compiled again in the same way; code inside is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.capture.compiled import behind
from gatecc.errors import UnsupportedModelError
from tests.recipes.tiny import tiny

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


class Counter:
    """A backend that counts the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def opened(model: nn.Module) -> nn.Module:
    """Gates that are not 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".gate." in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def expected(x: Tensor = X) -> Tensor:
    return opened(gatecc.transform(tiny(layers=2).eval(), "gated-attention", (X,), verify=False))(x)


def test_the_model_behind_is_rewritten_and_compiled_again(tmp_path: Path) -> None:
    counter = Counter()
    shell: Any = torch.compile(tiny(layers=2).eval(), backend=counter, fullgraph=True)
    gated: Any = opened(gatecc.transform(shell, "gated-attention", (X,), verify=False))
    assert counter.graphs == 0, "nothing is compiled on the way"
    assert gatecc.last_report(gated).model == "Tiny"
    assert type(gated) is type(shell)
    assert gated is not shell
    assert torch.allclose(gated(X), expected(), atol=1e-6)
    assert counter.graphs == 1, "the same backend"
    assert torch.equal(shell(X), tiny(layers=2).eval()(X))
    gatecc.save(gated, tmp_path)
    assert torch.equal(gatecc.load(tiny(layers=2), tmp_path).eval()(X), behind(gated)(X))
    plain: Any = gatecc.revert(gated)
    assert type(plain) is type(shell)
    assert torch.equal(plain(X), shell(X))


def test_in_place_the_shell_stays() -> None:
    shell: Any = torch.compile(tiny(layers=2).eval(), backend="eager")
    before = shell(X)  # compiled already: what it compiled must not be run again
    assert gatecc.transform(shell, "gated-attention", (X,), inplace=True, verify=False) is shell
    opened(shell)
    assert torch.allclose(shell(X), expected(), atol=1e-6)
    assert gatecc.revert(shell, inplace=True) is shell
    assert torch.equal(shell(X), before)


def test_inspect_looks_behind() -> None:
    shell: Any = torch.compile(tiny(layers=1).eval())
    assert gatecc.inspect(shell, (X,)).sites


def _part(model: Any) -> Any:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    return model


def _in_place(model: Any) -> Any:
    model.blocks[0].compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("make", "where", "do"),
    [(_part, "blocks.0", "_orig_mod"), (_in_place, "blocks.0", "then compile")],
    ids=["a part", "in place"],
)
def test_compiled_code_inside_is_refused(make: Any, where: str, do: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        gatecc.transform(make(tiny(layers=1).eval()), "gated-attention", (X,))
    assert caught.value.where == where
    assert do in caught.value.do


def test_taken_off_compiled_code_is_no_hindrance() -> None:
    model: Any = _in_place(tiny(layers=2).eval())
    model.blocks[0]._compiled_call_impl = None
    gated = opened(gatecc.transform(model, "gated-attention", (X,), verify=False))
    assert torch.equal(gated(X), expected())
    assert torch.equal(copy.deepcopy(gated)(X), expected())
