"""one_more: which axes of a call grow with the number of samples. The shapes are those that torch's pages name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gatecc
from gatecc.engine.analyse import analyse
from gatecc.engine.other_size import one_more

PADDING = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 7])


def layer(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)


class Masked(nn.Module):
    """Reads its mask only if that hides something, as the models of transformers do: export sees no tie of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        q = self.q(x) + positions[..., None]
        return F.scaled_dot_product_attention(q[:, None], x[:, None], x[:, None])


class Choosy(nn.Module):
    """Cannot be captured as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, *x: Tensor) -> Tensor:
        return self.q(x[0]) if float(x[0].sum()) != 1234.0 else x[0]


def r(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[nn.Module, tuple[Any, ...], list[tuple[int, ...]] | str]] = {
    "batch first": (layer(True), (r(3, 7, 16), None, PADDING), [(4, 7, 16), (4, 7)]),
    "sequence first": (layer(False), (r(7, 3, 16), None, PADDING), [(7, 4, 16), (4, 7)]),
    "sequence first, one sample": (layer(False), (r(7, 1, 16),), [(7, 2, 16)]),
    "one sample": (layer(True), (r(1, 7, 16), None, PADDING[:1]), [(2, 7, 16), (2, 7)]),
    "no batch": (layer(True), (r(7, 16),), "no axis of an input is known to count samples"),
    "two streams": (nn.TransformerDecoderLayer(16, 4, 32), (r(7, 3, 16), r(5, 3, 16)), [(7, 4, 16), (5, 4, 16)]),
    "recurrent": (nn.LSTM(4, 4), (r(7, 3, 4),), [(7, 4, 4)]),
    "image": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (r(2, 3, 8, 8),), [(3, 3, 8, 8)]),
    "a mask that is not read": (Masked(), (r(3, 7, 16), r(3, 7), r(1, 7)), [(4, 7, 16), (4, 7), (1, 7)]),
    "no graph of the whole": (Choosy(), (r(3, 7, 16), r(3)), [(4, 7, 16), (4,)]),
    "no graph, other sizes": (Choosy(), (r(3, 16), r(7, 3)), "no axis of an input is known to count samples"),
}


@pytest.mark.parametrize(("model", "args", "expected"), CASES.values(), ids=CASES)
def test_axes(model: nn.Module, args: tuple[Any, ...], expected: list[tuple[int, ...]] | str) -> None:
    found = analyse(model.eval(), args, {})
    call = one_more(found.programs, found.sites, args, {})
    if isinstance(expected, str):
        assert call == expected
        return
    before, after = ([x for x in pytree.tree_leaves(c) if isinstance(x, Tensor)] for c in ((args, {}), call))
    assert [tuple(x.shape) for x in after] == expected
    for x, y in zip(before, after, strict=True):
        assert torch.equal(y[tuple(slice(n) for n in x.shape)], x), "what was there stays in its place"


def test_an_object_among_the_inputs() -> None:
    assert one_more([], [], (object(),), {}) == "an input is neither a tensor nor a constant"


def test_parameters_for_each_token_are_checked_at_their_number_of_tokens() -> None:
    """Unbatched and sequence-first: the first axis counts tokens, for each of which the gate has a parameter."""
    gate = gatecc.Gate(gatecc.Attention[...].out, gatecc.GateSpec("param", "none", "token"))
    for batch_first, x, noted in ((True, r(7, 16), True), (False, r(7, 3, 16), False)):
        gated = gatecc.transform(layer(batch_first).eval(), gate, (x,))
        notes = gatecc.last_report(gated).notes
        assert any("checked at one size" in note for note in notes) is noted
        with torch.no_grad():
            assert torch.allclose(gated(x), layer_like(gated)(x), atol=1e-6)


def layer_like(gated: nn.Module) -> nn.Module:
    return gatecc.revert(gated)
