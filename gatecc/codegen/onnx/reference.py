"""Reference: what a captured model computes in float64 throughout, to judge errors of float32 by.

A cast in the model's own code is a cast to float64 here, and so are its constants' dtypes: the difference from torch is
what float32 costs torch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from gatecc.ir.ops import opname

_DRAWS = 3
_FACTOR = {
    **dict.fromkeys("mm bmm matmul linear conv1d conv2d conv3d convolution _convolution".split(), 0),
    **dict.fromkeys("scaled_dot_product_attention linear_attention attention".split(), 0),
    **dict.fromkeys("addmm baddbmm".split(), 1),
}  # which argument is the first factor of a product
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


def reference(program: ExportedProgram, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs for these inputs in float64; integers and booleans as they are."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    out = _Float64(module).run(*(_widened(x) for x in leaves))
    return tuple(_tensors(out))


def drawn(program: ExportedProgram, leaves: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The outputs in float64 with every result of the graph moved at random by as much as its own dtype rounds, a few
    times: how far from the reference these are is what rounding does to the model for these inputs.

    Monte Carlo arithmetic (Parker, Monte Carlo Arithmetic, 1997). Torch's own distance is one such draw, which may be a
    lucky one where a difference of two large numbers is divided by its size.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    found: list[tuple[Tensor, ...]] = []
    for number in range(_DRAWS):
        out = _Rounded(module, torch.Generator().manual_seed(number)).run(*(_widened(x) for x in leaves))
        found.append(tuple(_tensors(out)))
    return found


class _Float64(fx.Interpreter):
    """Runs a graph with every float tensor in float64."""

    def fetch_attr(self, target: str) -> Any:
        return pytree.tree_map(_widened, super().fetch_attr(target))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _CHECKS:
            return None
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return pytree.tree_map(_widened, super().call_function(target, args, kwargs))


class _Rounded(_Float64):
    """Moves every result by up to half a unit in its last place. Whole numbers are exact, and so is another view.

    A sum of K products rounds K times, each time by so much of what it has come to, which is half the root of K times
    what it is off when each factor rounds once: so much are the factors moved, before they are multiplied.
    """

    def __init__(self, module: fx.GraphModule, generator: torch.Generator) -> None:
        super().__init__(module)
        self._generator = generator

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        flat, spec = pytree.tree_flatten(self.call_function(n.target, self._with_factors(n, args), kwargs))
        narrow = pytree.tree_leaves(n.meta.get("val"))
        if len(narrow) == len(flat):
            flat = [self._rounded(x, of, given) for x, of in zip(flat, narrow, strict=True)]
        return pytree.tree_unflatten(flat, spec)

    def _rounded(self, x: Any, of: Any, given: set[int]) -> Any:
        narrow = isinstance(x, Tensor) and isinstance(of, Tensor) and of.dtype in _NARROW
        if not narrow or x.untyped_storage().data_ptr() in given:
            return x
        return torch.where(x == x.round(), x, self._moved(x, torch.finfo(of.dtype).eps / 2))

    def _with_factors(self, n: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a product, one factor moved."""
        at = _FACTOR.get(opname(n))
        if at is None or len(args) <= at + 1 or not all(isinstance(x, Tensor) for x in args[at : at + 2]):
            return args
        x, y = args[at : at + 2]
        narrow = getattr(n.args[at], "meta", {}).get("val")
        whole = all(torch.equal(z, z.round()) for z in (x, y) if z.is_floating_point())
        if whole or not isinstance(narrow, Tensor) or narrow.dtype not in _NARROW:
            return args
        terms = y[0].numel() if opname(n).startswith("conv") else x.shape[-1]
        by = torch.finfo(narrow.dtype).eps / 4 * terms**0.5
        return (*args[:at], self._moved(x, by), *args[at + 1 :])

    def _moved(self, x: Tensor, by: float) -> Tensor:
        drawn = torch.rand(x.shape, generator=self._generator, dtype=torch.float64) * 2 - 1
        return x * (1 + by * drawn.to(x.device))


def _tensors(of: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(of) if isinstance(x, Tensor)]


def _widened(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x in _NARROW else x
    return x.double() if isinstance(x, Tensor) and x.dtype in _NARROW else x
