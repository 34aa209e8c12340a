"""acts: what was installed acts in every mode that a model is called in: gradients on and off, eval and train.

That a graph runs in one mode says nothing about the others: a parent may hand the weights of a scope to a fused
operator instead of calling it, when gradients are off or in training. So the model itself is called in the four modes,
with noise on every new parameter and without any hook, for hooks switch such paths off. For each scope it is seen that
its graph ran, or that nothing in the output depends on the scope's weights; in eval mode both grad modes must give the
same output, in train mode the noise must be seen in both.
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gatecc.capture.adapters import caches_off
from gatecc.capture.shield import callers_device, random_states_kept
from gatecc.capture.signature import copied
from gatecc.engine.analyse import in_mode
from gatecc.engine.contracts import compare
from gatecc.errors import ContractError, GateccError
from gatecc.ir.weights import Effect, Values, noise
from gatecc.scope.learn import lookup
from gatecc.scope.scope import plain
from gatecc.scope.state import scope_of

_SLOT = (
    "_compiled_call_impl"  # where nn.Module.compile puts what a call runs: no hook, and no path of torch asks for it
)
_TOLERANCE = 1e-4  # between grad modes, relative to max(1, max|output|): torch's own paths differ by 1e-6


@dataclass(frozen=True)
class Mode:
    """How a model is called."""

    training: bool
    gradients: bool

    def __str__(self) -> str:
        grad = "with gradients" if self.gradients else "without gradients"
        return f"{'train' if self.training else 'eval'} mode {grad}"


EVAL, EVAL_NO_GRAD = Mode(False, True), Mode(False, False)
TRAIN, TRAIN_NO_GRAD = Mode(True, True), Mode(True, False)


@dataclass
class Acts:
    """What was seen. ``missed``: for each scope that some mode goes past, the error that says so."""

    missed: dict[str, GateccError] = field(default_factory=dict[str, GateccError])
    notes: list[str] = field(default_factory=list[str])
    seconds: dict[str, float] = field(default_factory=dict[str, float])


def acts(
    model: nn.Module,
    scopes: Collection[str],
    effects: Collection[Effect],
    call: tuple[tuple[Any, ...], dict[str, Any]],
) -> Acts:
    """Call a transformed model in four modes with noise on its new parameters, which get their values back bitwise.

    ``scopes``: FQNs of the scopes to watch. ``effects``: what was done to the model's weights. ``call``: the example
    inputs. Raises the GateccError of a call in eval mode with gradients.
    """
    generator = torch.Generator().manual_seed(0)
    new: dict[str, Values] = {}
    for effect in effects:
        new[effect.path] = {**new.get(effect.path, {}), **effect.noisy(model, generator)}
    return _Look(model, {fqn: model.get_submodule(fqn) for fqn in scopes}, new, call).look()


@contextmanager
def holding(values: Values) -> Generator[None]:
    """Parameters with other values for a while; afterwards they have their own back, bitwise."""
    own = [(p, held.part, p.data if held.part is None else held.part.clone()) for p, held in values.items()]
    try:
        for p, held in values.items():
            _hold(p, held.part, held.value)
        yield
    finally:
        for p, part, value in own:
            _hold(p, part, value)


def _hold(parameter: nn.Parameter, part: torch.Tensor | None, value: torch.Tensor) -> None:
    """In place only where a copy could be too large. What was derived from a weight sees that: its version changes."""
    if part is None:
        parameter.data = value
    else:
        part.copy_(value)


@dataclass
class _Seen:
    """One call: the output, how often each scope ran, and what the call raised in which scope."""

    output: Any = None
    calls: dict[str, int] = field(default_factory=dict[str, int])
    error: Exception | None = None
    running: str = ""


@dataclass
class _Look:
    model: nn.Module
    scopes: dict[str, nn.Module]
    new: dict[str, Values]  # by what it belongs to, the new parameters with noise
    call: tuple[tuple[Any, ...], dict[str, Any]]
    found: Acts = field(default_factory=Acts)
    learned: float = 0.0

    def look(self) -> Acts:
        clock = time.process_time()
        known = {id(entry) for entry in self._entries()}
        if self._all():
            self._eval()
            self._train()
        made: dict[str, float] = {}
        for entry in (e for e in self._entries() if id(e) not in known):
            for name, seconds in entry.seconds.items():
                made[name] = made.get(name, 0.0) + seconds
        share = max(0.0, self.learned - sum(made.values()))
        self.found.seconds = {**made, "share": share, "run": time.process_time() - clock - self.learned}
        return self.found

    def _entries(self) -> Iterator[Any]:
        families = {id(state.family): state.family for m in self.scopes.values() if (state := scope_of(m))}
        return (entry for family in families.values() for kinds in family.entries.values() for entry in kinds)

    # -- the modes -----------------------------------------------------------------------------------------------------

    def _eval(self) -> None:
        first, second = self._noisy(EVAL), self._noisy(EVAL_NO_GRAD)
        if first and not compare(self._run(EVAL, {}).output, first.output):
            self.found.notes.append("noise on the new parameters is not seen in the outputs for these example inputs")
        if first and second and not self._alike(first, second):
            self._one_by_one(EVAL, EVAL_NO_GRAD)

    def _train(self) -> None:
        """Random numbers may fall otherwise without gradients: outputs that differ must at least show the noise."""
        first, second = self._noisy(TRAIN), self._noisy(TRAIN_NO_GRAD)
        if not first or not second or self._alike(first, second):
            return
        moved = [compare(self._run(m, {}).output, s.output) > 0 for m, s in ((TRAIN, first), (TRAIN_NO_GRAD, second))]
        if moved == [True, False]:
            self._one_by_one(TRAIN, TRAIN_NO_GRAD)

    def _alike(self, first: _Seen, second: _Seen) -> bool:
        return compare(first.output, second.output) <= self._tolerance(second.output)

    def _noisy(self, mode: Mode) -> _Seen | None:
        """A call with noise on all new parameters; None if it fails.

        A call that gatecc refuses in train mode is refused when it is made: that is a note here.
        """
        seen = self._run(mode, self._all())
        if seen.error is None:
            self._ran(mode, seen)
            return seen
        own, refused = self._plain(mode).error, isinstance(seen.error, GateccError)
        if own:
            self.found.notes.append(f"{mode} was not looked at: the model does not run there: {_line(own)}")
        elif refused and mode == EVAL:
            raise seen.error
        elif refused and mode.training:
            self.found.notes.append(f"{mode} was not looked at, its calls are refused: {_line(seen.error)}")
        else:
            self._miss(seen.running, mode, f"the call fails: {_line(seen.error)}", seen.error)
        return None

    # -- what is wrong -------------------------------------------------------------------------------------------------

    def _ran(self, mode: Mode, seen: _Seen) -> None:
        """Every scope was called, or the output does not depend on what it holds: a dropped layer, an unused branch."""
        missing = {fqn: module for fqn, module in self.scopes.items() if not seen.calls.get(fqn)}
        if not missing or compare(seen.output, self._run(mode, self._all()).output):
            return  # a model that draws other numbers in each call shows nothing
        for fqn, module in missing.items():
            values = {p: noise(p, torch.Generator().manual_seed(1)) for p in self._alone(module)}
            other = self._run(mode, self._all() | values)
            if not other.error and compare(seen.output, other.output):
                self._miss(fqn, mode, "its weights are read, and it is not called")

    def _alone(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters that a scope alone holds, new ones left out."""
        inside = {id(m) for m in module.modules()}
        outside = {id(p) for m in self.model.modules() if id(m) not in inside for p in m._parameters.values()}
        new = {id(p) for values in self.new.values() for p in values}
        return [p for p in module.parameters() if id(p) not in outside | new and p.is_floating_point()]

    def _one_by_one(self, first: Mode, second: Mode) -> None:
        """Two modes that must agree do not: find the scopes that make the difference, each with its own noise alone.

        What no scope shows alone is rounding that grew through the layers, and so is what the model without rewrites
        shows as well.
        """
        own = [self._plain(mode) for mode in (first, second)]
        allowed = 10 * compare(own[0].output, own[1].output)
        for fqn in self.scopes:
            inside = [v for name, v in self.new.items() if not fqn or f"{name}.".startswith(f"{fqn}.")]
            values: Values = {p: x for part in inside for p, x in part.items()}
            a, b = (self._run(mode, values).output for mode in (first, second))
            gap = compare(a, b)
            if gap > max(allowed, self._tolerance(b)):
                self._miss(fqn, second, f"outputs differ by {gap:.3g} from those {str(first).split(' mode ')[1]}")

    def _miss(self, fqn: str, mode: Mode, found: str, cause: Exception | None = None) -> None:
        error = ContractError(
            "what was installed does not act in every mode in which the model is called",
            where=fqn or type(self.model).__name__,
            found=f"in {mode}, {found}",
            expected="its rewritten graph runs, as it does in the other modes",
            do='scope="model" rewrites the model as one graph; or call its modules in the same way in all modes',
        )
        error.__cause__ = cause
        self.found.missed.setdefault(fqn, error)

    def _tolerance(self, output: Any) -> float:
        floats = [x.dtype for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        return max([_TOLERANCE, *(16 * torch.finfo(dtype).eps for dtype in floats)])

    # -- one call ------------------------------------------------------------------------------------------------------

    def _all(self) -> Values:
        return {p: x for values in self.new.values() for p, x in values.items()}

    def _plain(self, mode: Mode) -> _Seen:
        """A call of the model without its rewrites."""
        with plain(self.model):
            return self._run(mode, {}, watch=False)

    def _run(self, mode: Mode, values: Values, watch: bool = True) -> _Seen:
        seen = _Seen()
        args, kwargs = copied(self.call)
        with ExitStack() as stack:
            for context in (
                holding(values),
                caches_off(self.model),
                in_mode(self.model, mode.training),
                _seeded(),
                callers_device(),
            ):
                stack.enter_context(context)
            stack.enter_context(torch.set_grad_enabled(mode.gradients))
            if watch:
                stack.enter_context(self._watched(seen))
            try:
                output = self.model(*args, **kwargs)
            except Exception as e:
                seen.error = e
                return seen
        seen.output = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, output)
        return seen

    @contextmanager
    def _watched(self, seen: _Seen) -> Generator[None]:
        """Count the calls of the scopes. A scope that is called runs its rewrites, or raises: see gatecc.scope."""
        try:
            for fqn, module in self.scopes.items():
                vars(module)[_SLOT] = functools.partial(self._called, seen, fqn, module)
            yield
        finally:
            for module in self.scopes.values():
                vars(module).pop(_SLOT, None)

    def _called(self, seen: _Seen, fqn: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.calls[fqn] = seen.calls.get(fqn, 0) + 1
        seen.running = fqn
        known = lookup(module, args, kwargs) is not None
        clock = time.process_time()
        output = module._call_impl(*args, **kwargs)
        if not known:
            self.learned += time.process_time() - clock
        seen.running = ""
        return output


@contextmanager
def _seeded() -> Generator[None]:
    """The same random numbers in every call; the caller's go on as if nothing had been."""
    with random_states_kept():
        torch.manual_seed(0)
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        yield


def _line(error: Exception | None) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"
