"""FuseExperts: one operator in the place of how a model dispatches tokens to the experts that it has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from gatecc import ops as ops  # registers the operator
from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, exact
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.ops import argument, opname
from gatecc.ir.program import Program, origin, shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import MLP, Site, Weight
from gatecc.ir.sizes import on_example
from gatecc.ops.moe_ffn.activations import names
from gatecc.passes.operands import place, stage
from gatecc.passes.trial import Trial, UntriedError

_TOLERANCE = 1e-6  # of a token in float64, relative to its largest number
_LARGE = 6.0  # standard deviation of what the last rows of the experts yield: beyond the clamps of gpt-oss


@dataclass(frozen=True)
class FuseExperts(Rewrite):
    """Let one operator, ``gatecc::moe_ffn``, compute the experts of a site, in the place of the model's own dispatch.

    The function stays: which activation and which layout of the weights the experts have is proved on random numbers,
    and experts that compute anything else are refused. Weights are read as they lie, transposed ones too; router, hooks
    on the module of the experts and the state dict stay as they are. The values between the products are gone, so gates
    on ``hidden`` come without this rewrite.
    """

    name = "fuse_experts"

    def contract(self) -> Contract:
        return exact()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def reads(self) -> Iterable[str]:
        return ("in", "weights", "indices", "out")

    def rewrite(self, site: Site, edit: Editor) -> None:
        stacks = _stacks(site, edit.program)
        options = _formula(site, edit.program)
        x, weights, indices, out = (stage(site, name).node for name in ("in", "weights", "indices", "out"))
        swapped = tuple(site.weights[role].orientation == "in_out" for role in _roles(site))
        dtype = out.meta["val"].dtype
        y = edit.call(one_operator, x, weights, indices, *stacks, swapped, dtype, *options, name="experts")
        edit.replace(out, y)
        edit.discard(out, inside=True)


def one_operator(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    swapped: tuple[bool, bool],
    dtype: torch.dtype,
    activation: str,
    layout: str,
) -> Tensor:
    """x (T, d), weights and indices (T, k) -> (T, d). Matrices that are ``swapped`` hold (in, out)."""
    up, down = (w.transpose(1, 2) if swap else w for w, swap in zip((up, down), swapped, strict=True))
    x = x if x.dtype == up.dtype else x.to(up.dtype)
    y: Tensor = torch.ops.gatecc.moe_ffn(
        x, weights, indices, up, down, up_bias, down_bias, activation=activation, layout=layout
    )
    return y if y.dtype == dtype else y.to(dtype)


def _roles(site: Site) -> tuple[str, str]:
    roles = set(site.weights) - {"router"}
    if not isinstance(site, MLP) or site.form != "experts":
        raise _refused(site, "no experts", "a site that has experts: the other rewrites are for dense layers")
    if roles not in ({"gate_up", "down"}, {"up", "down"}):
        found = f"weights {', '.join(sorted(roles)) or 'none'}"
        raise _refused(site, found, "gate and up in one stack and down in another, or up and down")
    return ("gate_up" if "gate_up" in roles else "up"), "down"


def _stacks(site: Site, program: Program) -> list[fx.Node | None]:
    """The nodes that hold the two stacks and the two biases."""
    nodes = {name: node for node in program.graph.nodes if (name := program.weight_name(node)) is not None}
    weights = [site.weights[role] for role in _roles(site)]
    return [*(nodes[w.fqn] for w in weights), *(None if w.bias is None else nodes[w.bias] for w in weights)]


def _formula(site: Site, program: Program) -> tuple[str, str]:
    """The activation and the layout with which the operator computes what the graph does. Raises SiteRefusedError."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        return _Proof(site, program).found()


class _Proof:
    """The experts of a site on random tokens, weights and choices."""

    def __init__(self, site: Site, program: Program) -> None:
        self.site = site
        self.generator = torch.Generator().manual_seed(0)
        self.names = [n for role in _roles(site) for n in (site.weights[role].fqn, site.weights[role].bias) if n]
        self.numbers: dict[str, Tensor] = {}
        x, weights, indices, out = (stage(site, name).node for name in ("in", "weights", "indices", "out"))
        self.x, self.weights = self._random(_sizes(x)), self._random(_sizes(weights))
        assert isinstance(site, MLP)
        self.indices = torch.randint(site.experts, _sizes(indices), generator=self.generator)
        self.constants = list(_constants(program, site))
        known = {x: self.x, weights: self.weights, indices: self.indices.clone()}
        try:
            self.y = Trial(program, known, self._weight).run(out)
        except UntriedError as e:
            raise _refused(site, str(e), "tokens, weights and indices that meet the stacks, and nothing else") from e

    def found(self) -> tuple[str, str]:
        """The activation and the layout of the operator."""
        up, down = (self.site.weights[role] for role in _roles(self.site))
        tensors = [self._oriented(up), self._oriented(down), *(self.numbers.get(w.bias or "") for w in (up, down))]
        layouts = ("halves", "interleaved") if "gate_up" in self.site.weights else ("plain",)
        errors: dict[tuple[str, str], float] = {}
        for activation in (*self.constants, *names()):
            for layout in layouts:
                if layout == "plain" and activation.startswith("swiglu"):
                    continue
                y = torch.ops.gatecc.moe_ffn(
                    self.x, self.weights, self.indices, *tensors, activation=activation, layout=layout
                )
                gap = (y - self.y).abs().amax(-1) / self.y.abs().amax(-1).clamp_min(1e-30)
                errors[activation, layout] = error = float(gap.max())
                if error < _TOLERANCE:
                    return activation, layout
        nearest = min(errors, key=errors.__getitem__)
        raise _refused(
            self.site,
            f"the nearest formula, {nearest[0]} with {nearest[1]}, differs by {errors[nearest]:.1e}",
            "the sum of w * down(act(gate(x)) * up(x)) over the experts that were chosen",
        )

    def _oriented(self, weight: Weight) -> Tensor:
        numbers = self.numbers[weight.fqn]
        return numbers if weight.orientation == "out_in" else numbers.transpose(1, 2)

    def _weight(self, name: str, held: Tensor) -> Tensor | None:
        """Random experts. Each begins a row after the one before it in one tall matrix: they differ, and need the
        memory of one. Some rows yield large numbers, for activations that are clamped."""
        if name not in self.names:
            return None
        if name not in self.numbers:
            count, *sizes = held.shape
            tall = self._random([sizes[0] + count, *sizes[1:]])
            scale = torch.linspace(0.3, _LARGE, tall.size(0), dtype=tall.dtype).view(-1, *(1 for _ in sizes[1:]))
            tall = tall * scale / (self.x.size(-1) ** 0.5 if len(sizes) == 2 else 1)
            self.numbers[name] = tall.as_strided(held.shape, (tall.stride(0), *tall.stride()))
        return self.numbers[name]

    def _random(self, sizes: list[int]) -> Tensor:
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64)


def _sizes(node: fx.Node) -> list[int]:
    return [on_example(size) or 1 for size in shape(node)]


def _constants(program: Program, site: Site) -> Iterator[str]:
    """Clamped SwiGLU with the numbers that stand in the graph of the experts."""
    inside = [n for n in program.calls() if origin(n).owner == site.owner]
    limits = _numbers(argument(n, 2, "max") for n in inside if opname(n) == "clamp")
    slopes = _numbers(argument(n, 1, "other") for n in inside if opname(n) == "mul")
    for limit in sorted(limits):
        for slope in sorted(slopes | {1.0}):
            yield f"swiglu(alpha={slope}, limit={limit})"


def _numbers(found: Iterable[object]) -> set[float]:
    return {float(x) for x in found if isinstance(x, int | float)}


def _refused(site: Site, found: str, expected: str) -> SiteRefusedError:
    return SiteRefusedError(
        "these experts are not what the one operator computes",
        where=place(site),
        found=found,
        expected=expected,
        do='leave this site out: sites="mlp[...]" takes globs, ranges and but(...)',
    )
