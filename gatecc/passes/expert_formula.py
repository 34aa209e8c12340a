"""The formula of experts: what a graph computes between a choice of experts and their sum, proved on random numbers.

However a model dispatches tokens, the experts are run in float64 on random tokens, weights and choices, and compared
with ``gatecc::moe_ffn``. Choices are also drawn so that all tokens take the same experts: what has a capacity drops
some then, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from gatecc import ops as ops  # registers the operator
from gatecc.errors import SiteRefusedError
from gatecc.ir.ops import argument, opname
from gatecc.ir.program import Program, origin, shape
from gatecc.ir.site import MLP, Site
from gatecc.ir.sizes import on_example
from gatecc.ops.moe_ffn.activations import names
from gatecc.passes.operands import place
from gatecc.passes.trial import Trial, UntriedError

_TOLERANCE = 1e-6  # of a token in float64, relative to its largest number
_LARGE = 6.0  # standard deviation of what the last rows of the experts yield: beyond the clamps of gpt-oss
_WIDE = 96  # widths beyond it are tried as smaller ones
_TRIED = (24, 40)  # in their place: of the tokens, and inside the experts


@dataclass(frozen=True, eq=False)
class Call:
    """The values of one call of experts. x: (..., d), weights and indices: (..., k), out: (..., o)."""

    x: fx.Node
    weights: fx.Node
    indices: fx.Node
    out: fx.Node


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
    """x (..., d), weights and indices (..., k) -> (..., d). Matrices that are ``swapped`` hold (in, out)."""
    up, down = (w.transpose(1, 2) if swap else w for w, swap in zip((up, down), swapped, strict=True))
    rows, weights, indices = (t if t.dim() == 2 else t.reshape(-1, t.size(-1)) for t in (x, weights, indices))
    rows = rows if rows.dtype == up.dtype else rows.to(up.dtype)
    y: Tensor = torch.ops.gatecc.moe_ffn(
        rows, weights, indices, up, down, up_bias, down_bias, activation=activation, layout=layout
    )
    y = y if y.dtype == dtype else y.to(dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.size(-1))


def roles(site: Site) -> tuple[str, str]:
    """The names of the two stacks. Raises SiteRefusedError for a site without them."""
    found = set(site.weights) - {"router"}
    if not isinstance(site, MLP) or site.form != "experts":
        raise _refused(site, "no experts", "a site that has experts: the other rewrites are for dense layers")
    if found not in ({"gate_up", "down"}, {"up", "down"}):
        text = f"weights {', '.join(sorted(found)) or 'none'}"
        raise _refused(site, text, "gate and up in one stack and down in another, or up and down")
    return ("gate_up" if "gate_up" in found else "up"), "down"


def stacks(site: Site, program: Program) -> list[fx.Node | None]:
    """The nodes that hold the two stacks and the two biases."""
    nodes = {name: node for node in program.graph.nodes if (name := program.weight_name(node)) is not None}
    weights = [site.weights[role] for role in roles(site)]
    return [*(nodes[w.fqn] for w in weights), *(None if w.bias is None else nodes[w.bias] for w in weights)]


def swapped(site: Site) -> tuple[bool, bool]:
    """Which of the two stacks holds (in, out)."""
    up, down = (site.weights[role].orientation == "in_out" for role in roles(site))
    return up, down


def formula(site: Site, program: Program, call: Call) -> tuple[str, str]:
    """The activation and the layout with which the operator computes what the graph does. Raises SiteRefusedError."""
    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        return _Proof(site, program, call).found()


class _Proof:
    """The experts of a site on random tokens, weights and choices.

    Widths are free: wide experts are tried as narrow ones, where no other size of the graph is the same number.
    """

    def __init__(self, site: Site, program: Program, call: Call) -> None:
        self.site, self.program = site, program
        assert isinstance(site, MLP)
        self.generator = torch.Generator().manual_seed(0)
        self.names = [n for role in roles(site) for n in (site.weights[role].fqn, site.weights[role].bias) if n]
        self.numbers: dict[str, Tensor] = {}
        self.sizes = _narrow(site, program, call)
        self.x, self.weights = self._random(self._sizes(call.x)), self._random(self._sizes(call.weights))
        self.constants = list(_constants(program, site))
        self.choices = list(_choices(call.indices, self._sizes(call.indices), site.experts, self.generator))
        self.y = [self._run(call, indices) for indices in self.choices]

    def _run(self, call: Call, indices: Tensor) -> Tensor:
        known = {call.x: self.x, call.weights: self.weights, call.indices: indices.clone()}
        try:
            return Trial(self.program, known, self._weight, self.sizes).run(call.out)
        except UntriedError as e:
            expected = "tokens, weights and indices that meet the stacks, and nothing else"
            raise _refused(self.site, str(e), expected) from e

    def found(self) -> tuple[str, str]:
        """The activation and the layout of the operator."""
        held = [self.site.weights[role] for role in roles(self.site)]
        up, down = (self._numbers(weight.fqn) for weight in held)
        up_bias, down_bias = (self.numbers.get(weight.bias or "") for weight in held)
        layouts = ("halves", "interleaved") if "gate_up" in self.site.weights else ("plain",)
        errors: dict[tuple[str, str], float] = {}
        for activation in (*self.constants, *names()):
            for layout in layouts:
                if layout == "plain" and activation.startswith("swiglu"):
                    continue
                errors[activation, layout] = error = self._error(up, down, up_bias, down_bias, activation, layout)
                if error < _TOLERANCE:
                    return activation, layout
        nearest = min(errors, key=errors.__getitem__)
        raise _refused(
            self.site,
            f"the nearest formula, {nearest[0]} with {nearest[1]}, differs by {errors[nearest]:.1e}",
            "the sum of w * down(act(gate(x)) * up(x)) over the experts that were chosen",
        )

    def _error(
        self,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: str,
        layout: str,
    ) -> float:
        """The largest difference of a token; the first choices tell most formulas apart."""
        worst, rest = 0.0, (up, down, up_bias, down_bias, swapped(self.site), torch.float64, activation, layout)
        for indices, theirs in zip(self.choices, self.y, strict=True):
            ours = one_operator(self.x, self.weights, indices, *rest)
            if ours.shape != theirs.shape:
                return float("inf")
            gap = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1).clamp_min(1e-30)
            worst = max(worst, float(gap.nan_to_num(torch.inf).max()))
            if worst >= _TOLERANCE:
                break
        return worst

    def _numbers(self, name: str) -> Tensor:
        if name not in self.numbers:
            raise _refused(self.site, f"{name} is not read on the way", "two stacks that the result depends on")
        return self.numbers[name]

    def _weight(self, name: str, held: Tensor) -> Tensor | None:
        """Random experts. Each begins a row after the one before it in one tall matrix: they differ, and need the
        memory of one. Some rows yield large numbers, for activations that are clamped."""
        if name not in self.names:
            return None
        if name not in self.numbers:
            count, *sizes = (self.sizes.get(size, size) for size in held.shape)
            tall = self._random([sizes[0] + count, *sizes[1:]])
            scale = torch.linspace(0.3, _LARGE, tall.size(0), dtype=tall.dtype).view(-1, *(1 for _ in sizes[1:]))
            tall = tall * scale / (self.x.size(-1) ** 0.5 if len(sizes) == 2 else 1)
            self.numbers[name] = tall.as_strided((count, *sizes), (tall.stride(0), *tall.stride()))
        return self.numbers[name]

    def _sizes(self, node: fx.Node) -> list[int]:
        return [self.sizes.get(size, size) for size in _on_example(node)]

    def _random(self, sizes: list[int]) -> Tensor:
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64)


def _on_example(node: fx.Node) -> list[int]:
    return [on_example(size) or 1 for size in shape(node)]


def _narrow(site: Site, program: Program, call: Call) -> dict[int, int]:
    """Smaller sizes by the widths that are tried with them: of the tokens, of the experts, twice that with a gate."""
    up, down = (w for role in roles(site) if (w := _stack(site, program, role)) is not None)
    assert isinstance(site, MLP)
    width = _on_example(call.x)[-1]
    inner = up.shape[1 if site.weights[roles(site)[0]].orientation == "out_in" else 2]
    hidden = inner // 2 if "gate_up" in site.weights else inner
    if down.numel() // site.experts != width * hidden:
        return {}  # experts that change the width of the tokens
    taken = {*_on_example(call.x)[:-1], *_on_example(call.indices), site.experts}
    rows = _on_example(call.indices)
    taken |= {int(torch.tensor(rows).prod()), int(torch.tensor(rows[:-1]).prod()), site.experts + 1}
    if width == hidden or inner == width or {width, hidden, inner} & taken:
        return {}
    sizes = {width: _TRIED[0]} if width > _WIDE else {}
    if hidden > _WIDE:
        sizes |= {hidden: _TRIED[1], inner: _TRIED[1] * (inner // hidden)}
    return sizes


def _stack(site: Site, program: Program, role: str) -> Tensor | None:
    fqn = site.weights[role].fqn
    return next((program.weight(n) for n in program.graph.nodes if program.weight_name(n) == fqn), None)


def _choices(node: fx.Node, sizes: list[int], experts: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices (..., k): any, all tokens the same, all tokens the same other ones. Those of a top-k are distinct."""
    rows, k = int(torch.tensor(sizes[:-1]).prod()), sizes[-1]
    if _are_distinct(node):
        yield torch.rand(rows, experts, generator=generator).argsort(-1)[:, :k].reshape(sizes)
    else:
        yield torch.randint(experts, sizes, generator=generator)
    yield torch.arange(k).remainder(experts).expand(sizes).clone()
    yield torch.arange(experts - k, experts).remainder(experts).flip(0).expand(sizes).clone()


def _are_distinct(node: fx.Node) -> bool:
    """Whether indices were chosen by a top-k, which takes nobody twice."""
    while node.op == "call_function" and opname(node) in ("getitem", "to", "_to_copy", "detach", "alias", "view"):
        node = node.all_input_nodes[0]
    return opname(node) == "topk"


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
