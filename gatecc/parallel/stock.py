"""Stock experts: the classes of transformers that dispatch tokens to their experts by themselves.

Their `experts_implementation` is a name that a table of transformers resolves on every call. Ours, ``"gatecc"``, is
``gatecc::moe_ffn``, which knows experts that are sharded; no graph is captured. What the experts of a class compute
between their products is proved on random numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ops.moe_ffn.activations import Layout, activation, names

NAME = "gatecc"
_FORMULA = "_gatecc_formula"  # of a module: activation and layout
_TOLERANCE = 1e-6
_LARGE = 6.0  # standard deviation of the numbers: beyond the clamps of gpt-oss
_WIDTH = 32


def is_stock(module: nn.Module) -> bool:
    """Whether transformers looks up how the experts of a module are run."""
    return all(hasattr(module, name) for name in ("config", "has_gate", "has_bias", "is_transposed", "_apply_gate"))


def run_by_operator(model: nn.Module, where: str) -> None:
    """Let the experts in ``where``, and those that share their configuration, run as one operator. Raises ArgumentError
    for a class that computes something else."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
    chosen: Any = model.get_submodule(where)
    config = chosen.config
    for name, module in model.named_modules():
        if is_stock(module) and vars(module).get("config") is config:
            vars(module)[_FORMULA] = formula(module, name)
    config._experts_implementation = NAME


def experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An `experts_implementation`. hidden_states: (T, d), top_k_index and top_k_weights: (T, k) -> (T, d)."""
    up = "gate_up_proj" if self.has_gate else "up_proj"
    first, last = getattr(self, up), self.down_proj
    if self.is_transposed:
        first, last = first.transpose(1, 2), last.transpose(1, 2)
    biases = (getattr(self, f"{up}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    found = vars(self).get(_FORMULA) or formula(self, type(self).__name__)
    rows = hidden_states.to(first.dtype)
    y: Tensor = torch.ops.gatecc.moe_ffn(
        rows, top_k_weights, top_k_index, first, last, *biases, activation=found[0], layout=found[1]
    )
    return y.to(hidden_states.dtype)


def formula(module: nn.Module, where: str) -> tuple[str, Layout]:
    """The activation and the layout that a module's experts have. Raises ArgumentError for a function that the operator
    lacks."""
    stock: Any = module
    layouts: tuple[Layout, ...] = ("halves", "interleaved") if stock.has_gate else ("plain",)
    z = torch.randn(64, 2 * _WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * _LARGE
    if not getattr(stock, "has_post_expert_norm", False):
        with torch.no_grad():
            right = stock._apply_gate(z) if stock.has_gate else stock.act_fn(z)
        for name in _candidates(module):
            for layout in layouts:
                if layout == "plain" and activation(name).of_both:
                    continue
                ours = activation(name).hidden(z, layout)
                if ours.shape == right.shape and float((ours - right).abs().max()) <= _TOLERANCE * float(
                    right.abs().max()
                ):
                    return name, layout
    raise ArgumentError(
        "these experts are not what one operator computes",
        where=where,
        found=f"{type(module).__name__}, whose activation or norm gatecc::moe_ffn does not have",
        expected="the sum of w * down(act(gate(x)) * up(x)) over the experts that were chosen",
        do="leave this module out: experts= takes globs",
    )


def _candidates(module: nn.Module) -> Iterator[str]:
    """The activation that its own numbers make, then all others."""
    numbers = {name: float(x) for name, x in vars(module).items() if isinstance(x, float)}
    for limit in sorted(set(numbers.values())):
        for alpha in sorted({*numbers.values(), 1.0}):
            yield f"swiglu(alpha={alpha}, limit={limit})"
    yield from names()
