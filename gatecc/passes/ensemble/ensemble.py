"""Ensemble: several whole models behind one call. Control flow between them stays in Python, so what is not chosen does
not run.

    call --> bind the inputs by name
               |
               v
             no router yet ------> every member runs, the mean of their outputs
               |
               v
             router: weights (B, k) and indices (B, k), from inputs, features and members, which run on all samples
               |
               v
             masked, or in an export? ---- yes --> every member on all samples, the outputs masked: one graph
               | no
               v
             each member on the samples that chose it (and on those whose member reads it); nobody's is not called
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing Dynamo for it
from torch.utils import _pytree as pytree

from gatecc import ops as ops  # registers gatecc::only_if
from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError
from gatecc.ir.gates.choice import Chosen
from gatecc.ops import paths
from gatecc.passes.ensemble.arguments import Call, Names
from gatecc.passes.ensemble.chooser import Chooser, Form
from gatecc.passes.ensemble.costs import Cost, parameters_of, table
from gatecc.passes.ensemble.outputs import Sum, part, rows_of, take
from gatecc.passes.samples import weight_of

ROUTER = "router"
Function = TypeVar("Function", bound=Callable[..., Any])


def _eager(function: Function) -> Function:
    """Which rows go where is data: torch.compile leaves this alone, and compiles the members, each by itself."""
    return cast("Function", _disable_dynamo(function, recursive=False))


class Ensemble(nn.Module):
    """Several whole models that are called as one; made by `gatecc.ensemble`, given a router by a recipe.

    Members keep their classes, and their parameters are ``members.NAME...``; ``features`` are models that only the
    router and other members read, ``projections`` bring an output to the common form.

    ``masked``: every member runs on all samples, and what was not chosen is masked: the same outputs and gradients, for
    wrappers that want to see each parameter in each step (DDP), and for compilers. Exports do that by themselves; in
    ONNX each member stands in a branch that runs if a sample of the batch chose it.
    """

    def __init__(
        self,
        members: Mapping[str, nn.Module],
        features: Mapping[str, nn.Module],
        projections: Mapping[str, nn.Module],
        names: Names,
        calls: Mapping[str, Call],
        parts: Mapping[str, str],
        order: Sequence[str],
    ) -> None:
        super().__init__()
        self.members = nn.ModuleDict(dict(members))
        self.features = nn.ModuleDict(dict(features))
        self.projections = nn.ModuleDict(dict(projections))
        self.inputs = names
        self.calls = dict(calls)
        self.parts = dict(parts)
        self.order = tuple(order)  # features and members, each behind what it reads
        self.masked = False
        self.branches = False  # see `in_branches`
        self.forms: dict[str, Form | None] = {}  # of inputs and outputs on the example
        self.costs: dict[str, Cost] = {}  # of features and members
        self.whole = False  # whether outputs hold whole numbers, which cannot be weighted

    @property
    def names(self) -> tuple[str, ...]:
        """The members, in the order in which a router counts them."""
        return tuple(self.members)

    @property
    def chooser(self) -> Chooser | None:
        """The router, None before a recipe gave one."""
        return cast("Chooser | None", self._modules.get(ROUTER))

    def model(self, name: str) -> nn.Module:
        """A member or feature."""
        return self.members[name] if name in self.members else self.features[name]

    def closure(self, names: Iterable[str]) -> tuple[str, ...]:
        """These features and members, and all that they read, in the order in which they run."""
        wanted = set(names)
        for name in reversed(self.order):
            if name in wanted:
                wanted |= set(self.calls[name].reads)
        return tuple(name for name in self.order if name in wanted)

    def path(self, members: Iterable[str]) -> Cost:
        """What runs for a sample that chose these members: they, what they read, what the router reads, the router."""
        chooser = self.chooser
        names = self.closure([*members, *(chooser.reads if chooser is not None else ())])
        modules = [self.model(n) for n in names] + [self.projections[n] for n in names if n in self.projections]
        flops = sum(self.costs[n].flops for n in names)
        if chooser is not None:
            flops += self._router_flops(chooser)
        return Cost(parameters_of([*modules, *([chooser] if chooser is not None else [])]), flops)

    def describe(self) -> str:
        """Parameters and operations per sample: of each model, and of the path to one member against all of them."""
        rows = {f"{'feature' if n in self.features else 'member'} {n}": self.costs[n] for n in self.order}
        if (chooser := self.chooser) is not None:
            rows["router"] = Cost(parameters_of([chooser]), self._router_flops(chooser))
            rows |= {f"path to {n}": self.path([n]) for n in self.members}
        return table({**rows, "all members": self.path(self.members)})

    def _router_flops(self, chooser: Chooser) -> float:
        form = self.forms[self.inputs.all[0]]
        rows = form.shape[0] if form is not None and form.shape else 1
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        zeros = [torch.zeros(f.shape, dtype=f.dtype, device=device) for n in chooser.reads if (f := self.forms[n])]
        return counted(lambda: chooser.logits(torch.zeros(rows, device=device), *zeros))[1] / rows

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The members' outputs, chosen and weighted for each sample. Inputs are those of `gatecc.ensemble`, by name."""
        values = self.inputs.bind(args, kwargs)
        if not torch.compiler.is_exporting() and rows_of(list(values.values())) == 0:
            return self._nothing(values, 0)
        if self.chooser is not None and not (self.masked or torch.compiler.is_exporting() or paths.is_whole()):
            return self._skipping(values, self.chooser)
        return self.combined(values)

    def outputs(self, values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """The outputs of features and members on all samples. ``values``: the inputs; what was run is added to them."""
        for name in self.closure(names):
            if name not in values:
                values[name] = self.output_of(name, values)
        return values

    def output_of(self, name: str, values: Mapping[str, Any]) -> Any:
        """What is taken of the output of one feature or member, given the values that it reads."""
        made = part(name, self.calls[name](self.model(name), values), self.parts.get(name, ""))
        return self.projections[name](made) if name in self.projections else made

    def combined(self, values: dict[str, Any]) -> Any:
        """The output of a call in which every member runs. ``values``: inputs, and outputs that are known already."""
        return self._mean(values) if self.chooser is None else self._masked(values, self.chooser)

    def _mean(self, values: dict[str, Any]) -> Any:
        total = Sum(rows_of(list(values.values())), one=len(self.members) == 1)
        self.outputs(values, self.members)
        for number, name in enumerate(self.members):
            total.add(number, values[name], 1 / len(self.members), None, None)
        return total.result()

    def _masked(self, values: dict[str, Any], chooser: Chooser) -> Any:
        rows = rows_of(list(values.values()))
        self.outputs(values, chooser.reads)
        weights, indices = chooser(*self.given(values, chooser))
        hits = [_hit(weights, indices, number) for number in range(len(self.members))]
        chosen = {name: hit.any(1) for name, hit in zip(self.members, hits, strict=True)}
        need = self.need(chosen)
        read = {name for call in self.calls.values() for name in call.reads}
        for name in self.closure(self.members):
            if name not in values:
                made = self.output_of(name, values)
                values[name] = self._only_if(made, need[name], name) if name in read else made
        total = self._sum(rows, chooser)
        for number, (name, hit) in enumerate(zip(self.members, hits, strict=True)):
            only = partial(self._only_if, chosen=chosen[name], label=f"{name}_weighted")
            total.add(number, values[name], weight_of(weights, hit), None, chosen[name], only)
        return total.result()

    def need(self, chosen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Which samples (B,) need the output of each member and of what members read, given who chose them."""
        need = dict(chosen)
        for name in reversed(self.order):
            if name in need:
                for read in self.calls[name].reads:
                    if read in self.calls:
                        need[read] = need[read] | need[name] if read in need else need[name]
        return need

    def _only_if(self, value: Any, chosen: Tensor, label: str) -> Any:
        """What an exported graph computes only if some sample needs it; zeros, or a value that nobody reads, else."""
        if not self.branches:
            return value
        condition = chosen.any()

        def one(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            zeros = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            return torch.ops.gatecc.only_if(x, zeros, condition, label)

        return pytree.tree_map(one, value)

    @_eager
    def _skipping(self, values: dict[str, Any], chooser: Chooser) -> Any:
        rows = rows_of(list(values.values()))
        self.outputs(values, chooser.reads)
        weights, indices = chooser(*self.given(values, chooser))
        _check_finite(weights)
        hits = [_hit(weights, indices, number) for number in range(len(self.members))]
        chosen = {name: hit.any(1) for name, hit in zip(self.members, hits, strict=True)}
        run = _Run(self, values, chosen, rows)
        self._note(run, chooser)
        if not any(run.counts.values()):
            return self._nothing(values, rows)
        total = self._sum(rows, chooser)
        for number, name in enumerate(self.members):
            found = run.of(name)
            if found is not None:
                output, at = found
                weight = weight_of(weights, hits[number])
                total.add(number, output, weight if at is None else weight.index_select(0, at), at, None)
        return total.result()

    def _note(self, run: _Run, chooser: Chooser) -> None:
        if paths.is_watched():
            ran = [run.needed.get(name, run.rows) for name in self.names]
            at = tuple(chooser.parameters()) or tuple(self.members[self.names[0]].parameters())
            paths.note(paths.Taken("member", ran, run.rows, at, units=self.names))

    def _nothing(self, values: dict[str, Any], rows: int) -> Any:
        """Zeros for every sample. What shapes these have, the first member tells on one sample, made up if there is
        none: many models do not run on an empty batch."""

        def one(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.dim():
                return x
            return x[:1] if x.size(0) else x.new_zeros(1, *x.shape[1:])

        with torch.no_grad():
            first = self.names[0]
            known = self.outputs({n: pytree.tree_map(one, values[n]) for n in self.inputs.all if n in values}, [first])
        like = next(x for x in pytree.tree_leaves(known[first]) if isinstance(x, Tensor))
        at, weights = like.new_zeros(0, dtype=torch.int64), like.new_zeros(0, dtype=torch.float32)
        total = Sum(rows, one=True)
        total.add(0, pytree.tree_map(lambda x: x[:0] if isinstance(x, Tensor) else x, known[first]), weights, at, None)
        return total.result()

    def logits(self, *args: Any, **kwargs: Any) -> Tensor:
        """The router's scores for a call, (B, E) in float32. Only what the router reads is run.

        Raises ArgumentError if the ensemble has no router.
        """
        chooser, given = self._asked(args, kwargs)
        return chooser.logits(*given)

    def chosen(self, *args: Any, **kwargs: Any) -> Chosen:
        """Weights (B, k) and members (B, k), by number, E for an empty slot: for who calls members otherwise, such as
        their ``generate``. Only what the router reads is run. Raises ArgumentError if the ensemble has no router."""
        chooser, given = self._asked(args, kwargs)
        return chooser(*given)

    def _asked(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Chooser, list[Tensor]]:
        if (chooser := self.chooser) is None:
            raise ArgumentError("the ensemble has no router yet", do='gatecc.transform(ensemble, "tryage", inputs)')
        return chooser, self.given(self.outputs(self.inputs.bind(args, kwargs), chooser.reads), chooser)

    def given(self, values: dict[str, Any], chooser: Chooser) -> list[Tensor]:
        """What the router is called with: a tensor (B,), and what it reads. Raises ArgumentError if that is missing."""
        if missing := [name for name in chooser.reads if name not in values]:
            raise ArgumentError("the router reads an input that this call does not have", found=", ".join(missing))
        read = [values[name] for name in chooser.reads]
        like = next(x for x in pytree.tree_leaves(list(values.values())) if isinstance(x, Tensor) and x.dim())
        return [torch.zeros(like.size(0), device=like.device), *read]

    def _sum(self, rows: int, chooser: Chooser) -> Sum:
        return Sum(rows, chooser.combine, chooser.uniform, one=chooser.k == 1)


@contextmanager
def every_member(model: nn.Module) -> Generator[None]:
    """Every ensemble in a model runs all of its members for a while, so that who looks on sees each of them."""
    before = [(module, module.masked) for module in model.modules() if isinstance(module, Ensemble)]
    try:
        for module, _ in before:
            module.masked = True
        yield
    finally:
        for module, masked in before:
            module.masked = masked


@contextmanager
def in_branches(model: nn.Module) -> Generator[bool]:
    """Every ensemble with a router marks for a while, in graphs, what is to be computed only if a sample chose it.

    Yields whether there is one.
    """
    found = [module for module in model.modules() if isinstance(module, Ensemble) and module.chooser is not None]
    try:
        for module in found:
            module.branches = True
        yield bool(found)
    finally:
        for module in found:
            module.branches = False


class _Run:
    """One call in which each feature and member runs on the samples that need it, and on no others."""

    @_eager
    def __init__(self, ensemble: Ensemble, values: dict[str, Any], chosen: dict[str, Tensor], rows: int) -> None:
        self.values = values
        self.rows = rows
        self.chosen = chosen
        self.need = ensemble.need(chosen)
        members = list(chosen)
        both = torch.stack([*chosen.values(), *(self.need[n] for n in self.need)]).sum(1).tolist()
        self.counts = dict(zip(members, both, strict=False))  # of samples that chose it
        self.needed = dict(zip(self.need, both[len(members) :], strict=True))
        self.at: dict[str, Tensor | None] = {}  # where a member ran: None is everywhere
        for name in ensemble.order:
            if name in values:
                self.at[name] = None
            elif self.needed.get(name):
                self._one(ensemble, name)

    @_eager
    def of(self, name: str) -> tuple[Any, Tensor | None] | None:
        """A member's output on the samples that chose it, and which these are; None if it is nobody's."""
        if not self.counts[name]:
            return None
        if self.counts[name] == self.rows:
            return self.values[name], None
        if self.need[name] is self.chosen[name] and self.at[name] is not None:  # no one else reads it
            return self.values[name], self.at[name]
        at = self.chosen[name].nonzero().squeeze(1)
        return self._rows(name, at), at

    @_eager
    def _one(self, ensemble: Ensemble, name: str) -> None:
        if self.needed.get(name) == self.rows:
            self.at[name] = None
            self.values[name] = ensemble.output_of(name, self.values)
            return
        at = self.need[name].nonzero().squeeze(1)
        reads = [read for read in ensemble.calls[name].reads if read in self.values]
        self.values[name] = ensemble.output_of(name, {read: self._rows(read, at) for read in reads})
        self.at[name] = at

    @_eager
    def _rows(self, name: str, at: Tensor) -> Any:
        """The rows of the samples ``at`` in an input or output, which may have run on a part of all samples."""
        ran = self.at.get(name)
        if ran is None:
            return take(name, self.values[name], at, self.rows)
        return take(name, self.values[name], torch.searchsorted(ran, at), ran.numel())


def _hit(weights: Tensor, indices: Tensor, number: int) -> Tensor:
    """Which slots (B, k) hold a member. At inference a weight of 0 leaves it out; in training it has a gradient."""
    hit = indices == number
    return hit if torch.is_grad_enabled() else hit & (weights != 0)


@_eager
def _check_finite(weights: Tensor) -> None:
    if not bool(torch.isfinite(weights).all()):
        bad = (~torch.isfinite(weights)).any(1).nonzero().squeeze(1).tolist()
        raise ArgumentError(
            "the router of the ensemble gave weights that are no numbers",
            where=ROUTER,
            found=f"NaN or infinity for {len(bad)} of {weights.size(0)} samples, the first {bad[0]}",
            do="look for NaN in what the router reads, and in its parameters",
        )
