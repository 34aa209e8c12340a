"""FFN: an MLP site as the plain formula that an expert computes, proved on random numbers.

What lies between the input and the output of a site may be spelled in many ways: a written-out GELU, views, dropout,
gate and up in one matrix in either order. So its part of the graph is run in float64 on random inputs and weights and
compared with the formula, where it has thresholds beyond them too, and at other sizes where they are free; a site that
computes anything else is refused, with the difference that was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from gatecc.errors import SiteRefusedError
from gatecc.ir.ops import DROPOUTS, opname
from gatecc.ir.program import Program, attribute, shape
from gatecc.ir.site import MLP, Site, Weight
from gatecc.ir.sizes import Sizes, on_example, value
from gatecc.ops.moe_ffn.activations import Layout, activation, names
from gatecc.passes.expert_sizes import other_sizes
from gatecc.passes.operands import place, stage
from gatecc.passes.trial import Trial, UntriedError
from gatecc.passes.unseen import scales, unseen

_TOLERANCE = 1e-6  # of the formula in float64, relative: other activations differ by 1e-4 and more
Order = Literal["plain", "apart", "gate_up", "up_gate", "interleaved"]


class Stacked(NamedTuple):
    """The weights of a dense layer: ``gate_up`` (2F, d), the rows of the gate before those of up, or (F, d) without
    one; ``down`` (o, F); and their biases. With an axis of experts before the others, those of experts.
    """

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True)
class FFN:
    """``down @ (act(gate @ x) * (up @ x))``, or ``down @ act(up @ x)`` if ``order`` is plain.

    ``weights``: those of the site by role. ``order``: "apart" for gate and up in matrices of their own, else how the
    rows of the one matrix lie. ``width`` of x, ``hidden`` and ``out`` features; ``activation`` as text of the operator.
    """

    weights: dict[str, Weight]
    order: Order
    width: int
    hidden: int
    out: int
    activation: str

    @property
    def gated(self) -> bool:
        """Whether a gate multiplies the hidden features."""
        return self.order != "plain"

    @property
    def bias(self) -> tuple[bool, bool]:
        """Whether the first and the last product add a bias."""
        first = self.weights["gate" if self.order == "apart" else "up" if self.order == "plain" else "gate_up"]
        return first.bias is not None, self.weights["down"].bias is not None

    @property
    def last(self) -> str:
        """The full name of the module of the last product."""
        return self.weights["down"].fqn.rpartition(".")[0]

    def tensors(self) -> Iterator[str]:
        """The full names of its parameters."""
        for weight in self.weights.values():
            yield weight.fqn
            if weight.bias is not None:
                yield weight.bias

    def stacked(self, read: Callable[[str], Tensor]) -> Stacked:
        """gate_up (2F, d) or (F, d), its bias, down (o, F) and its bias, from parameters by their full names."""
        first = [self.weights[r] for r in ("gate", "up", "gate_up") if r in self.weights]
        matrix = torch.cat([oriented(w, read(w.fqn)) for w in first])
        bias = torch.cat([rows_of(w, read(str(w.bias))) for w in first]) if self.bias[0] else None
        down = self.weights["down"]
        down_bias = None if down.bias is None else rows_of(down, read(down.bias))
        return Stacked(
            self._halves(matrix),
            None if bias is None else self._halves(bias),
            oriented(down, read(down.fqn)),
            down_bias,
        )

    def _halves(self, rows: Tensor) -> Tensor:
        """Rows as the gate's, then those of up."""
        if self.order == "interleaved":
            return torch.cat([rows[::2], rows[1::2]])
        return torch.cat(rows.chunk(2)[::-1]) if self.order == "up_gate" else rows


def oriented(weight: Weight, tensor: Tensor) -> Tensor:
    return rows_of(weight, tensor if weight.orientation == "out_in" else tensor.transpose(-1, -2))


def rows_of(weight: Weight, tensor: Tensor) -> Tensor:
    return tensor if weight.rows is None else tensor[slice(*weight.rows)]


def read_ffn(site: Site, program: Program) -> FFN:
    """The formula of an MLP site. Raises SiteRefusedError for one that computes something else."""
    if not isinstance(site, MLP) or site.form == "experts":
        found = "experts already" if isinstance(site, MLP) else f"a site of kind {site.kind}"
        raise _refused(site, found, "a dense MLP: mlp[...]")
    _check_weights(site)
    given, out = stage(site, "in"), stage(site, "out")
    if given.axes.features != "c" or given.axes[-1] != "c" or out.axes[-1] != "c":
        raise _refused(site, f"axes {given.axes} in, {out.axes} out", "channels as the last axis")
    names = {w.fqn for w in site.weights.values()} | {str(w.bias) for w in site.weights.values() if w.bias}
    nodes = Trial(program, {given.node: torch.empty(0)}, lambda name, held: None).needed(out.node)
    if text := unseen([n for n in nodes if opname(n) not in DROPOUTS], training=True):
        raise _refused(site, text, "a formula without that")
    sizes = other_sizes(program, nodes, given.node, _widths(site, program))
    if isinstance(sizes, str):
        raise _refused(site, sizes, "a formula that can be proved at a second number of tokens")

    def part(**other: Any) -> _Part:
        return _Part(program, site, given.node, out.node, names, **other)

    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        ffn = _proved(site, part())
        for scale in scales(program, nodes):
            _confirm(site, ffn, part(scale=scale), f"with numbers of {scale:.0e}")
        for symbols in sizes:
            other = part(symbols=symbols)
            _confirm(site, ffn, other, f"the sizes are free, and at {other.x[..., 0].numel()} tokens")
        return ffn


def _widths(site: MLP, program: Program) -> set[int]:
    """What tokens must not be as many as."""
    named = {w.fqn for w in site.weights.values()}
    return {int(size) for n in program.graph.nodes if program.weight_name(n) in named for size in shape(n)}


def _check_weights(site: MLP) -> None:
    roles = set(site.weights)
    if roles not in ({"up", "down"}, {"gate", "up", "down"}, {"gate_up", "down"}):
        raise _refused(
            site, f"weights {', '.join(sorted(roles)) or 'none'}", "up and down, and gate of gated forms, as parameters"
        )
    if conv := [role for role, w in site.weights.items() if w.orientation == "conv"]:
        raise _refused(site, f"{', '.join(conv)} are convolutions", "matrix products")
    biases = {w.bias is not None for role, w in site.weights.items() if role != "down"}
    if len(biases) == 2:
        raise _refused(site, "one of gate and up has a bias", "both or none")


class _Part:
    """The part of a graph between the input and the output of a site, on random numbers in float64.

    ``scale``: of the numbers; ``symbols``: free sizes that are others than on the example.
    """

    def __init__(
        self,
        program: Program,
        site: MLP,
        given: fx.Node,
        out: fx.Node,
        names: set[str],
        scale: float = 1.0,
        symbols: Sizes | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(sizes: list[int], scale: float) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64) * scale

        def weight(name: str, held: Tensor) -> Tensor | None:
            if name not in names:
                return None
            fan = held.shape[-1] if held.dim() > 1 else 4
            return self.weights.setdefault(name, random(list(held.shape), 1.5 * fan**-0.5))

        self.weights: dict[str, Tensor] = {}
        sizes = [int(value(s, symbols)) if symbols else on_example(s) or 1 for s in shape(given)]
        self.x = random(sizes, scale)
        try:
            self.y = Trial(program, {given: self.x}, weight, symbols=symbols).run(out)
        except UntriedError as e:
            raise _refused(site, f"{e} beside its input and weights", "what depends on these alone") from e


def _proved(site: MLP, part: _Part) -> FFN:
    """The formula whose result is that of the graph."""
    errors: dict[str, float] = {}
    orders: tuple[Order, ...] = ("gate_up", "up_gate", "interleaved") if "gate_up" in site.weights else ("apart",)
    for order in orders if site.form == "gated" else ("plain",):
        ffn = _shaped(site, order, part)
        for name in names():
            if order == "plain" and activation(name).of_both:
                continue
            errors[f"{name} ({order})"] = error = _error(tried := replace(ffn, activation=name), part)
            if error < _TOLERANCE:
                return tried
    nearest = min(errors, key=errors.__getitem__)
    raise _refused(
        site,
        f"activation {site.activation or 'none'}; the nearest formula, {nearest}, differs by {errors[nearest]:.1e}",
        "down(act(up(x))), or down(act(gate(x)) * up(x)), and nothing between but dropout",
    )


def _error(ffn: FFN, part: _Part) -> float:
    """The difference to the formula, relative, or infinity for a result of another shape."""
    rows, bias, down, down_bias = ffn.stacked(part.weights.__getitem__)
    h = torch.nn.functional.linear(part.x, rows, bias)
    layout: Layout = "plain" if ffn.order == "plain" else "halves"
    y = torch.nn.functional.linear(activation(ffn.activation).hidden(h, layout), down, down_bias)
    return float((y - part.y).norm() / part.y.norm()) if y.shape == part.y.shape else float("inf")


def _confirm(site: MLP, ffn: FFN, part: _Part, where: str) -> None:
    """Raises SiteRefusedError where the formula does not hold with these sizes and numbers."""
    error = _error(ffn, part)
    if not error < _TOLERANCE:
        found = f"{where} it differs by {error:.1e} from {ffn.activation}"
        raise _refused(site, found, "one formula for all sizes and numbers")


def _shaped(site: MLP, order: Order, part: _Part) -> FFN:
    down = site.weights["down"]
    out, hidden = oriented(down, part.weights[down.fqn]).shape
    return FFN(dict(site.weights), order, part.x.size(-1), hidden, out, "")


def relative(ffn: FFN, program: Program) -> Callable[[nn.Module], Callable[[str], Tensor]]:
    """For a layer that shares the program's graph, what reads its own parameter by the name that the program's has."""

    def of(layer: nn.Module) -> Callable[[str], Tensor]:
        return lambda name: cast("Tensor", attribute(layer, program.relative_name(name))).detach()

    return of


def _refused(site: Site, found: str, expected: str) -> SiteRefusedError:
    return SiteRefusedError(
        "this is no feed-forward layer that experts can compute",
        where=place(site),
        found=found,
        expected=expected,
        do='leave this site out: sites="mlp[...]" takes globs, ranges and but(...)',
    )
