"""Loop: a site over several steps with a state between them, unrolled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, exact, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.ops import mutates, opname
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Site
from gatecc.passes.loop.carry import Carry, Nothing, State, inside_of, needed
from gatecc.passes.loop.functional import functional
from gatecc.passes.loop.merge import Confident, Mean, Merge, Sum
from gatecc.passes.operands import place, stage

Numbers = dict[fx.Node, list[fx.Node]]  # the number of the first step -> those of the others


class StepScale(nn.Module):
    """p (T,), a number for each step, all 1 at first. It is read, not called."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(steps))


def at_step(p: Tensor, step: int) -> Tensor:
    """p_t, ()"""
    return p[step]


def scaled_by(y: Tensor, p: Tensor) -> Tensor:
    """y_t <- p_t * y_t"""
    return y * p.to(y.dtype)


@dataclass(frozen=True)
class Loop(Rewrite):
    """Run a site over ``steps`` steps that share its weights.

    (y_t, state_t) = f(x, state_(t-1)), y = merge(y_1, ..., y_T).

    ``carry`` is the state and how it enters: ``nothing``, ``spikes`` (activations become neurons, whose membranes are
    kept), ``output`` (what leaves a block enters it again), ``states`` (outputs of a model that are inputs of its next
    step). ``merge``: ``mean``, ``last``, ``sum``, or ``confident``, where a sample stops at the first step that is sure
    of it and later steps are computed for the others alone. ``scaled`` selects values, "conv[...].out", that are
    multiplied by a learned number for each step, 1 at first.

    The steps are unrolled; what no state reaches is computed once. One step without neurons is the site as it is.
    """

    name = "loop"

    steps: int
    carry: Carry = Nothing()
    merge: Merge = Mean()
    scaled: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "carry", Carry.coerce(self.carry))
        object.__setattr__(self, "merge", Merge.coerce(self.merge))
        if type(self.steps) is not int or self.steps < 1:
            raise ArgumentError(
                "a loop without steps computes nothing",
                found=f"steps={self.steps!r}",
                expected="a whole number of at least 1; 1 is the site once, as it is",
            )
        if self.site.kind not in self.carry.kinds:
            raise ArgumentError(
                f"{self.carry.tag} cannot be carried at such a site",
                found=str(self.site),
                expected="a site of kind " + " or ".join(self.carry.kinds),
            )
        if isinstance(self.merge, Confident) and self._alike:
            raise ArgumentError(
                "all steps are alike, so that none is surer than the first",
                found=f"carry={self.carry}",
                expected='a state: carry="spikes" or "states(...)", or numbers per step, scaled="conv[...].out"',
            )
        if self.scaled:
            Selector.parse(self.scaled)

    @property
    def _alike(self) -> bool:
        return isinstance(self.carry, Nothing) and not self.scaled

    def contract(self) -> Contract:
        if self.carry.changes:
            return changes_function()
        if self.steps == 1:
            return identity_at_init() if self.scaled else exact()
        stays = isinstance(self.carry, Nothing) and not isinstance(self.merge, Sum)
        return identity_at_init() if stays else changes_function()

    def effects(self) -> Effects:
        whole = self.site.kind not in ("block", "mlp")
        return Effects(whole_model=whole, loses_parameters=self.carry.changes, loses_cache=self.steps > 1)

    def reads(self) -> Iterable[str]:
        names = ("in", "out") if self.site.kind in ("block", "mlp") else ()
        return tuple(dict.fromkeys((*names, self.site.stage)))

    def rewrite(self, site: Site, edit: Editor) -> None:
        if self.steps == 1 and not self.carry.changes and not self.scaled:
            return
        out = stage(site, self.site.stage).node
        numbers, moved = self._scale(site, out, edit)
        state, out = self.carry.start(site, moved.get(out, out), edit, moved)
        results = [out, *self._unrolled(site, out, state, numbers, edit)]
        if self.steps == 1:
            return
        own = set(results[0].users) - edit.inserted
        joined = self.merge.join(results, site, edit)
        edit.replace(results[0], joined, own)

    def _scale(self, site: Site, out: fx.Node, edit: Editor) -> tuple[Numbers, dict[fx.Node, fx.Node]]:
        """The numbers of the steps, and the values that are scaled by those of the first."""
        numbers: Numbers = {}
        moved: dict[fx.Node, fx.Node] = {}
        inside = needed(out)
        for one in select(Selector.parse(self.scaled), edit.sites) if self.scaled else ():
            y = stage(one, Selector.parse(self.scaled).stage).node
            if y not in inside:
                continue
            made = edit.module(inside_of(site, one, "steps"), lambda: StepScale(self.steps))
            weight = edit.parameter(f"{made}.weight")
            first, *others = [edit.call(at_step, weight, t, name="p") for t in range(self.steps)]
            scaled = edit.call(scaled_by, y, first, name="scaled")
            edit.replace(y, scaled)
            numbers[first], moved[y] = others, scaled
        if self.scaled and not numbers:
            raise SiteRefusedError(
                "no value is scaled", where=place(site), found=f"{self.scaled} selects none that the site computes"
            )
        return numbers, moved

    def _unrolled(self, site: Site, out: fx.Node, state: State, numbers: Numbers, edit: Editor) -> list[fx.Node]:
        """The results of the steps behind the first."""
        body = self._body(site, out, state, numbers, edit)
        now, given, result = {n: n for n in body}, {n: n for n in (*state, *numbers)}, list[fx.Node]()
        for t in range(1, self.steps):
            entering = {first: now.get(left, left) for first, left in state.items()}
            entering |= {first: others[t - 1] for first, others in numbers.items()}
            instead = {given[first]: node for first, node in entering.items()}
            if body:
                copied = edit.duplicate([now[n] for n in body], instead)
                now = {n: copied[now[n]] for n in body}
            given = entering
            result.append(now.get(out, entering.get(out, out)))
        return result

    def _body(self, site: Site, out: fx.Node, state: State, numbers: Numbers, edit: Editor) -> list[fx.Node]:
        """What is another value in another step, in order. Raises SiteRefusedError for what cannot be done again."""
        starts = {*state, *numbers}
        wanted = set[fx.Node]().union(*(needed(node) for node in (out, *state.values())))
        found, todo = set[fx.Node](), list(starts)
        while todo:
            for user in todo.pop().users:
                if user in found or user in starts or user.op != "call_function":
                    continue
                if user in wanted or mutates(user):
                    found.add(user)
                    todo.append(user)
        functional(found)
        if writing := next((n for n in found if mutates(n) and not _settled(n)), None):
            raise SiteRefusedError(
                "a step writes to a tensor that the next one reads",
                where=place(site),
                found=f"{writing.name} ({opname(writing)}) {site.line}".strip(),
                do="write the operation without a trailing underscore (inplace=False)",
            )
        return sorted(found)


def _settled(node: fx.Node) -> bool:
    """Whether doing it again for each step is what it means: running statistics take in each step's values."""
    return opname(node) in ("batch_norm", "instance_norm")
