"""The formula of experts: what a graph computes between a choice of experts and their sum, proved on random numbers.

However a model dispatches tokens, the experts are run in float64 on random tokens, weights and choices, and compared
with ``gatecc::moe_ffn``. Choices are also drawn so that all tokens take the same experts: what has a capacity drops
some then, and is refused. Where sizes are free, the same holds at others; where the graph has thresholds, beyond them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from gatecc import ops as ops  # registers the operator
from gatecc.errors import SiteRefusedError
from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import argument, opname
from gatecc.ir.program import Program, shape
from gatecc.ir.site import MLP, Site
from gatecc.ir.sizes import Sizes, on_example, value
from gatecc.ops.moe_ffn.activations import names
from gatecc.passes.causal.remembered import Known
from gatecc.passes.expert_choices import are_distinct, choices, chooser
from gatecc.passes.expert_matrices import Matrices, Operands, Role
from gatecc.passes.expert_sizes import other_sizes
from gatecc.passes.expert_widths import fixed, narrow
from gatecc.passes.operands import place
from gatecc.passes.trial import Trial, UncomputedError, UntriedError
from gatecc.passes.unseen import scales, unseen

_TOLERANCE = 1e-6  # of a token in float64, relative to its largest number
_LARGE = 6.0  # standard deviation of what the last rows of the experts yield: beyond the clamps of gpt-oss


@dataclass(frozen=True, eq=False)
class Call:
    """The values of one call of experts. x: (..., d), weights and indices: (..., k), out: (..., o). Weights may be
    (..., E), with zeros for those that were not chosen (`is_sparse`); where k is 1, both may be without that axis."""

    x: fx.Node
    weights: fx.Node
    indices: fx.Node
    out: fx.Node

    @property
    def form(self) -> str:
        """How the weights are given: "slots" (..., k), "experts" (..., E), or "one" (...)."""
        x, weights, indices = map(_on_example, (self.x, self.weights, self.indices))
        if len(indices) == 1 or indices == x[:-1]:
            return "one"
        return "slots" if weights[-1] == indices[-1] else "experts"


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
    form: str = "slots",
) -> Tensor:
    """x (..., d), weights and indices (..., k) -> (..., d), or in another ``form`` of a Call. Matrices that are
    ``swapped`` hold (in, out)."""
    up, down = (w.transpose(1, 2) if swap else w for w, swap in zip((up, down), swapped, strict=True))
    if form == "one":
        weights, indices = weights.unsqueeze(-1), indices.unsqueeze(-1)
    elif form == "experts":
        weights = weights.gather(-1, indices)
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
        raise _refusal(place(site), "no experts", "a site that has experts: the other rewrites are for dense layers")
    if found not in ({"gate_up", "down"}, {"up", "down"}):
        text = f"weights {', '.join(sorted(found)) or 'none'}"
        raise _refusal(place(site), text, "gate and up in one stack and down in another, or up and down")
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


def formula(site: Site, program: Program, call: Call, *, training: bool) -> tuple[str, str]:
    """The activation and the layout with which the operator computes what the graph does. ``training``: and has its
    gradients. Raises SiteRefusedError."""
    return prove(program, call, [matrices(site, program)], training=training)[:2]


def prove(program: Program, call: Call, candidates: Sequence[Matrices], *, training: bool) -> tuple[str, str, Matrices]:
    """The same, where the parameters may have several parts: of one of the candidates, which have the same roles.

    Raises SiteRefusedError.
    """
    tokens, slots = prod(_on_example(call.x)[:-1]), _on_example(call.indices)
    if prod(slots if call.form == "one" else slots[:-1]) != tokens:
        raise _refused(
            candidates[0], f"{tokens} rows and choices {slots}", "a row of indices for each row of the tokens"
        )
    nodes = inside(program, call)
    if text := unseen(nodes, training=training):
        raise _refused(candidates[0], text, "a formula without that")
    width, hidden, k = _on_example(call.x)[-1], candidates[0].hidden, 1 if call.form == "one" else slots[-1]
    widths = {size // per for size in (width, hidden, 2 * hidden) for per in (1, k) if size % per == 0}
    sizes = other_sizes(program, nodes, call.x, widths)
    if isinstance(sizes, str):
        raise _refused(candidates[0], sizes, "a formula that can be proved at a second number of tokens")
    known = _known(program, call, candidates, nodes, (training, sizes))
    if (found := known.value()) is None:
        with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
            try:
                found = _proved(program, call, candidates, nodes, sizes, thin=True)
            except SiteRefusedError as e:
                if not isinstance(e.__cause__, UncomputedError):
                    raise
                found = _proved(program, call, candidates, nodes, sizes, thin=False)  # a width that cannot be another
        known.keep(found)
    activation, layout, chosen = found
    return activation, layout, candidates[chosen]


def _proved(
    program: Program,
    call: Call,
    candidates: Sequence[Matrices],
    nodes: Sequence[fx.Node],
    sizes: Sequence[Sizes],
    *,
    thin: bool,
) -> tuple[str, str, int]:
    """Activation, layout, and the place of the candidate. Raises SiteRefusedError."""
    activation, layout, held = _Proof(program, call, candidates, thin=thin).found()
    for scale in scales(program, nodes):
        proof = _Proof(program, call, [held], scale=scale, thin=thin)
        proof.confirm(activation, layout, f"with numbers of {scale:.0e}")
    for given in sizes:
        where = f"the sizes are free, and at {prod(_at(call.x, given)[:-1])} tokens"
        _Proof(program, call, [held], given, thin=thin).confirm(activation, layout, where)
    return activation, layout, candidates.index(held)


def _known(
    program: Program, call: Call, candidates: Sequence[Matrices], nodes: Sequence[fx.Node], mark: object
) -> Known:
    """What was proved of experts that are built alike: no proof reads a weight. A refusal names its place, so it is
    found anew."""
    marks: dict[fx.Node, list[object]] = {node: [] for node in (*nodes, call.x, call.weights, call.indices)}
    for name in ("x", "weights", "indices", "out"):
        marks[getattr(call, name)].append(name)
    for at, held in enumerate(candidates):
        named = {name: (held.roles.index(role), expert) for name, (role, expert) in held.named().items()}
        for node in nodes:
            if (name := program.weight_name(node)) in named:
                marks[node].append((at, named[name]))
    forms = [(h.experts, [r.shape for r in h.roles], len(h.up), h.swapped, h.gated) for h in candidates]
    around = call.form, are_distinct(call.indices), list(_constants(program, call))
    entering = (call.x, call.weights, call.indices)
    return Known(program, Flow(program), nodes, entering, marks, ("experts", forms, around, mark))


def inside(program: Program, call: Call) -> list[fx.Node]:
    """What stands between the tokens with their choice and the sum, in order; the parameters, too."""
    known = {n: torch.empty(0) for n in (call.x, call.weights, call.indices)}
    return Trial(program, known, lambda name, held: None).needed(call.out)


def matrices(site: Site, program: Program) -> Matrices:
    """The stacks of a site. Raises SiteRefusedError for a site without them."""
    held = [site.weights[role] for role in roles(site)]
    assert isinstance(site, MLP)
    tensors = {program.weight_name(n): t for n in program.graph.nodes if (t := program.weight(n)) is not None}

    def role(name: str) -> Role:
        return Role((name,), tuple(tensors[name].shape[1:]))

    up, down = (role(weight.fqn) for weight in held)
    biases = [None if weight.bias is None else role(weight.bias) for weight in held]
    return Matrices(
        place(site), site.experts, (up,), down, tuple(filter(None, biases[:1])), biases[1], swapped(site),
        "gate_up" in site.weights,
    )  # fmt: skip


def is_sparse(program: Program, x: fx.Node, weights: fx.Node, indices: fx.Node) -> bool:
    """Whether weights (..., E) are zero for all experts but those that a top-k has chosen, ties among them included.
    Run from random tokens, with random parameters."""
    generator = torch.Generator().manual_seed(0)
    source = chooser(indices).all_input_nodes[0]

    def random(sizes: Sequence[int]) -> Tensor:
        return torch.randn(list(sizes), generator=generator, dtype=torch.float64)

    with _disable_current_modes(), unset_fake_temporarily(), torch.no_grad():
        ties = torch.randint(3, _on_example(source), generator=generator).double()
        for known in ({}, {source: ties}):
            trial = Trial(program, {x: random(_on_example(x)), **known}, lambda name, held: random(held.shape))
            try:
                chosen, held = trial.run(indices), trial.run(weights)
            except UntriedError:
                return False
            if held.scatter(-1, chosen, 0.0).count_nonzero():
                return False
    return True


class _Proof:
    """Experts on random tokens, weights and choices.

    ``symbols``: free sizes that are others than on the example; ``scale``: of the numbers; ``thin``: wide experts are
    tried as narrow ones where that is possible.
    """

    def __init__(
        self,
        program: Program,
        call: Call,
        candidates: Sequence[Matrices],
        symbols: Sizes | None = None,
        *,
        scale: float = 1.0,
        thin: bool = True,
    ) -> None:
        self.candidates, self.program, self.symbols, self.scale = candidates, program, symbols, scale
        self.held = candidates[0]
        self.generator = torch.Generator().manual_seed(0)
        self.named = self.held.named()
        self.numbers: dict[Role, Tensor] = {}
        self.sizes = narrow(self.held, call.x, call.indices) if thin else {}
        self.call, self.x, k = call, self._random(self._sizes(call.x)) * scale, self._sizes(call.indices)
        self.weights = self._random([*k, 1] if call.form == "one" else k) * max(scale, 1.0)
        self.constants = list(_constants(program, call))
        distinct = are_distinct(call.indices)
        sizes = list(self.weights.shape)
        self.choices = list(choices(sizes, self.held.experts, self.generator, distinct=distinct))
        self.y: dict[int, Tensor] = {}

    def _theirs(self, choice: int) -> Tensor:
        """What the graph yields."""
        if choice not in self.y:
            self.y[choice] = self._run(self.choices[choice])
        return self.y[choice]

    def _run(self, indices: Tensor) -> Tensor:
        call, weights = self.call, self.weights
        if call.form == "experts":
            weights = weights.new_zeros([*weights.shape[:-1], self.held.experts]).scatter(-1, indices, weights)
        if call.form == "one":
            weights, indices = weights.squeeze(-1), indices.squeeze(-1)
        known = {call.x: self.x, call.weights: weights, call.indices: indices.clone()}
        try:
            return Trial(self.program, known, self._weight, self.sizes, self.symbols).run(call.out)
        except UntriedError as e:
            expected = "tokens, weights and indices that meet the experts' weights, and nothing else"
            raise _refused(self.held, str(e), expected) from e

    def found(self) -> tuple[str, str, Matrices]:
        """The activation and the layout of the operator, and whose they are."""
        self._theirs(0)
        for role in self.held.roles:
            if role not in self.numbers:
                text = f"{role.names[0]} is not read on the way"
                raise _refused(self.held, text, "two matrices per expert that the result depends on")
        errors: dict[tuple[str, str], float] = {}
        for held in self.candidates:
            operands = held.operands(self.numbers)
            for activation, layout in product((*self.constants, *names()), held.layouts):
                if layout == "plain" and activation.startswith("swiglu"):
                    continue
                error = self._error(operands, held, activation, layout)
                if error < _TOLERANCE:
                    return activation, layout, held
                errors[activation, layout] = min(error, errors.get((activation, layout), torch.inf))
        nearest = min(errors, key=errors.__getitem__)
        raise _refused(
            self.held,
            f"the nearest formula, {nearest[0]} with {nearest[1]}, differs by {errors[nearest]:.1e}",
            "the sum of w * down(act(gate(x)) * up(x)) over the experts that were chosen",
        )

    def confirm(self, activation: str, layout: str, where: str) -> None:
        """Raises SiteRefusedError where the one candidate is something else with these sizes and numbers."""
        self._theirs(0)
        (held,) = self.candidates
        error = self._error(held.operands(self.numbers), held, activation, layout)
        if not error < _TOLERANCE:
            found = f"{where} it differs by {error:.1e} from {activation} with {layout}"
            raise _refused(held, found, "one formula for all sizes and numbers")

    def _error(self, operands: Operands, held: Matrices, activation: str, layout: str) -> float:
        """The largest difference of a token; the first choices tell most formulas apart."""
        worst, rest = 0.0, (*operands, held.swapped, torch.float64, activation, layout)
        for at, indices in enumerate(self.choices):
            theirs = self._theirs(at)
            ours = one_operator(self.x, self.weights, indices, *rest)
            if ours.shape != theirs.shape:
                return float("inf")
            gap = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1).clamp_min(1e-30)
            worst = max(worst, float(gap.nan_to_num(torch.inf).max()))
            if worst >= _TOLERANCE:
                break
        return worst

    def _weight(self, name: str, held: Tensor) -> Tensor | None:
        if name not in self.named:
            return None
        role, expert = self.named[name]
        if role not in self.numbers:
            self.numbers[role] = self._stack(role)
        return self.numbers[role] if expert is None else self.numbers[role][expert]

    def _stack(self, role: Role) -> Tensor:
        """Random experts. Each begins a row after the one before it in one tall matrix: they differ, and need the
        memory of one. Some rows yield large numbers, for activations that are clamped."""
        sizes = [self.sizes.get(size, size) for size in role.shape]
        count = self.held.experts
        tall = self._random([sizes[0] + count, *sizes[1:]])
        scale = torch.linspace(0.3, _LARGE, tall.size(0), dtype=tall.dtype).view(-1, *(1 for _ in sizes[1:]))
        tall = tall * scale / (self.x.size(-1) ** 0.5 if len(sizes) == 2 else 1)
        tall = tall if len(sizes) == 2 else tall * self.scale
        return tall.as_strided((count, *sizes), (tall.stride(0), *tall.stride()))

    def _sizes(self, node: fx.Node) -> list[int]:
        numbers = zip(shape(node), _at(node, self.symbols), strict=True)
        return [self.sizes.get(number, number) if fixed(size) else number for size, number in numbers]

    def _random(self, sizes: list[int]) -> Tensor:
        return torch.randn(sizes, generator=self.generator, dtype=torch.float64)


def _on_example(node: fx.Node) -> list[int]:
    return [on_example(size) or 1 for size in shape(node)]


def _at(node: fx.Node, symbols: Sizes | None) -> list[int]:
    return [int(value(size, symbols)) for size in shape(node)] if symbols else _on_example(node)


def _constants(program: Program, call: Call) -> Iterator[str]:
    """Clamped SwiGLU with the numbers that stand in the graph of the experts."""
    inside = [n for n in program.calls() if call.x < n < call.out]
    limits = _numbers(argument(n, 2, "max") for n in inside if opname(n) == "clamp")
    slopes = _numbers(argument(n, 1, "other") for n in inside if opname(n) == "mul")
    for limit in sorted(limits):
        for slope in sorted(slopes | {1.0}):
            yield f"swiglu(alpha={slope}, limit={limit})"


def _numbers(found: Iterable[object]) -> set[float]:
    return {float(x) for x in found if isinstance(x, int | float)}


def _refused(held: Matrices, found: str, expected: str) -> SiteRefusedError:
    return _refusal(held.place, found, expected)


def _refusal(where: str, found: str, expected: str) -> SiteRefusedError:
    return SiteRefusedError(
        "these experts are not what the one operator computes",
        where=where,
        found=found,
        expected=expected,
        do='leave this site out: sites="mlp[...]" takes globs, ranges and but(...)',
    )
