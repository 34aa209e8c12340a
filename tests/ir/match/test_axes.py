"""An axis is followed through views: the numbers along it must stay together."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gatecc.ir.match.axes import axis_after, axis_before, axis_map, tensor_source
from tests.graphs import program_of, record

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda x: x.transpose(1, -1),
    "mT": lambda x: x.mT,
    "permute": lambda x: x.permute(3, 0, 2, 1),
    "movedim": lambda x: x.movedim(0, 2),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "view": lambda x: x.reshape(2, 3, 20),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(-2),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "select": lambda x: x[:, 1],
    "slice": lambda x: x[:, :, 1:3],
    "chunk": lambda x: x.chunk(2, 2)[1],
    "unbind": lambda x: x.unbind(1)[2],
    "multiply": lambda x: x * torch.ones(5),
    "broadcast": lambda x: x + torch.ones(7, 1, 1, 1, 1),
    "contiguous": lambda x: x.mT.contiguous(),
}
# Axes that are merged, split or taken one place of: no axis after is the whole of them.
LOST = {"view": {2, 3}, "flatten": {0, 1}, "unflatten": {2}, "squeeze": {1}, "select": {1}, "unbind": {1}}


@pytest.mark.parametrize("name", VIEWS)
def test_numbers_stay_on_their_axis(name: str) -> None:
    program = program_of(VIEWS[name], torch.randn(2, 3, 4, 5))
    final = program.outputs[0]
    chain = [final]
    while (source := tensor_source(chain[-1])) is not None:
        chain.append(source)
    followed: set[int] = set()
    for axis in range(4):
        at: int | None = axis
        for source, node in zip(chain[::-1], chain[-2::-1], strict=False):
            at = None if at is None else axis_after(node, source, at)
        if at is None:
            continue
        back: int | None = at
        for node, source in pairwise(chain):
            back = None if back is None else axis_before(node, source, back)
        assert back == axis
        numbers = torch.arange([2, 3, 4, 5][axis]).reshape([-1 if i == axis else 1 for i in range(4)])
        program.example[0] = numbers.expand(2, 3, 4, 5).float()
        out = record(program)[final].movedim(at, 0).flatten(1)
        spread = out - out[:, :1]
        assert bool((spread == 0).all()), (name, axis, at)
        followed.add(axis)
    assert followed == {0, 1, 2, 3} - LOST.get(name, set())


def test_what_scrambles_has_no_axes() -> None:
    program = program_of(lambda x: x[torch.tensor([1, 0])], torch.randn(2, 3))
    final = program.outputs[0]
    assert axis_map(final, program.placeholders[0]) is None
