"""sized: the values of a program of tensors alone, in symbols of its own, and an example of these sizes.

The symbols are new ones, for what the capture found out about its own (that a mask is as long as the tokens, say) does
not hold in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP, ShapeEnv, optimization_hint

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.emit.record import Symbols, record_calls
from gatecc.decoder.refuse import refusal
from gatecc.ir.loops import free_lengths
from gatecc.ir.program import Program
from gatecc.ir.sizes import expression

_BATCH, _CONTEXT = 2, 7  # sizes of the example

Fakes = Iterable[tuple[fx.Node, torch.Tensor]]


class Sizes:
    """The sizes of the captured graph in symbols of a program: all that stand for the batch are one."""

    def __init__(self, lengths: Lengths, symbol: Symbols) -> None:
        self.lengths, self.symbol = lengths, symbol
        batch = symbol("batch", _BATCH)
        self._known: dict[str, Any] = {str(s): batch for s in lengths.batch}
        self._known |= {str(s): symbol(f"context_{s}", _CONTEXT) for s in lengths.other}

    def like(self, captured: torch.Tensor, axis: int | None, size: Any) -> torch.Tensor:
        """A fake tensor like a captured one, with another size along one axis."""
        sizes = [size if i == axis else self._size(s) for i, s in enumerate(captured.shape)]
        return torch.empty(sizes, dtype=captured.dtype, device=captured.device)

    def _size(self, size: Any) -> Any:
        settled = self.lengths.settled(size)
        return settled if isinstance(settled, int) else eval(str(expression(settled)), dict(SYMPY_INTERP), self._known)


def record_closed(program: Program, inputs: Callable[[Symbols], Fakes], ones: Collection[fx.Node | None]) -> None:
    """Record the values of all nodes, and an example: zeros, and ones for some inputs. ``inputs`` yields the fake
    values of the placeholders in symbols that it is given."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    assert mode.shape_env is not None
    with mode, enable_python_dispatcher(), free_lengths(), torch.no_grad():
        for node, value in inputs(Symbols(mode.shape_env)):
            node.meta["val"] = value
        for node in program.graph.find_nodes(op="get_attr"):
            node.meta["val"] = mode.from_tensor(_real(program, node), static_shapes=True)
        record_calls(program, mode.shape_env)
    program.example = [
        torch.full([optimization_hint(s) for s in x.shape], int(node in ones), dtype=x.dtype, device=x.device)
        for node, x in ((n, n.meta["val"]) for n in program.placeholders)
    ]
    program.paths = [(node.name,) for node in program.placeholders]


def _real(program: Program, node: fx.Node) -> torch.Tensor:
    tensor = program.tensor(node)
    if tensor is None:
        raise refusal(next(iter(node.users)), "it runs a graph of its own, which is not looked into")
    return tensor
