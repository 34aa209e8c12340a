"""Ground truth: which attention cores ran, found by watching the tensors of one eager forward.

No graph and no pattern: every operator of the run is seen by a TorchDispatchMode, and three facts travel with each
storage. *raw*: it comes from parameters and constants through no contraction. *scores*: the contractions that it is
made of elementwise. *weights*: the softmaxes (or exponentials) that it is made of elementwise. A core is a softmax
whose

1. input is made elementwise of a contraction of two computed tensors (q and k; a router has a raw weight there), and
2. result meets, after elementwise operators only, a contraction with a computed tensor (the values), in which it is
   seen unchanged but for zeros, and to sum to at most one along the contracted axis. A written-out softmax (exp and a
   division) is non-negative there and sums to exactly one.

SDPA runs in its math form meanwhile, so that its softmax is seen too; it is a core by definition.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

Spelling = Literal["sdpa", "softmax", "manual"]
Reason = Literal[
    "scores are not a product of two computed tensors",
    "result meets no values in a product",
    "result is changed before it meets the values",
]
Stack = tuple[str, ...]

SOFTMAX: dict[Any, Spelling] = {aten._safe_softmax.default: "sdpa", aten._softmax.default: "softmax"}
EXPONENTIALS = {aten.exp.default, aten.exp_.default, aten.exp2.default}
CONTRACTIONS: dict[Any, tuple[int, int]] = {  # the positions of the two factors
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.addbmm.default: (1, 2),
}
# Operators that move elements and do not mix them. Views need no entry: they share the storage.
MOVES = {
    aten.cat.default,
    aten.stack.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.constant_pad_nd.default,
    aten.tril.default,
    aten.triu.default,
    aten.roll.default,
    aten.flip.default,
    aten.repeat.default,
    aten.native_dropout.default,
    aten._log_softmax.default,
    aten.slice_scatter.default,
}


@dataclass(frozen=True)
class Core:
    """One attention that ran."""

    owner: str
    """FQN of the innermost module whose call holds both the softmax and the product with the values."""
    spelling: Spelling
    mask: str
    """bidirectional, causal, sliding:W (causal, W keys), varied (not the same in all samples or windows), or other."""
    queries: int
    keys: int


@dataclass(frozen=True)
class Softmax:
    """One softmax that ran and is no plain attention."""

    owner: str
    reason: Reason


@dataclass(frozen=True)
class Truth:
    cores: tuple[Core, ...]
    others: tuple[Softmax, ...]

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple(core.owner for core in self.cores)


def observe(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Truth:
    """Run `model(*args, **kwargs)` once and say which attention cores ran, in the order of their softmaxes."""
    kwargs = kwargs or {}
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_no_fast_path())
        calls = stack.enter_context(_call_stack(model))
        observer = stack.enter_context(_Observer(calls, inputs))
        model(*args, **kwargs)
    return observer.truth()


@dataclass(eq=False)
class _Softmax:
    """A softmax or an exponential that ran."""

    spelling: Spelling
    stack: Stack
    scored: bool
    weights: Tensor
    core: Core | None = None
    changed: bool = False

    @property
    def reason(self) -> Reason:
        if not self.scored:
            return "scores are not a product of two computed tensors"
        if self.changed:
            return "result is changed before it meets the values"
        return "result meets no values in a product"

    def weighs(self, weights: Tensor) -> bool:
        """Whether `weights` (..., queries, keys), the left side of a product, are what this softmax returned."""
        sums = weights.double().sum(-1)
        if weights.min() < 0 or sums.max() > 1 + 1e-4:
            same = False
        elif self.spelling == "manual":
            same = bool((sums - 1).abs().max() < 1e-4)
        else:
            same = bool(torch.isin(weights, self.weights.to(weights.dtype)).logical_or(weights == 0).all())
        self.changed = not same
        return same


@dataclass(frozen=True)
class _Facts:
    """What is known about a storage."""

    raw: bool = True
    scored: bool = False
    weights: frozenset[_Softmax] = frozenset()


@dataclass(eq=False)
class _Observer(TorchDispatchMode):
    calls: list[str]
    inputs: Iterable[Tensor]
    facts: dict[int, _Facts] = field(default_factory=dict[int, _Facts])
    events: list[_Softmax] = field(default_factory=list[_Softmax])
    alive: list[Tensor] = field(default_factory=list[Tensor])

    def __post_init__(self) -> None:
        super().__init__()
        for tensor in self.inputs:
            self._set(tensor, _Facts(raw=False))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        facts = self._follow(func, args, tensors, outputs)
        views = {_key(tensor) for tensor in tensors}
        for output in outputs:
            if _key(output) not in views or func._schema.is_mutable:
                self._set(output, facts)
        return result

    def truth(self) -> Truth:
        cores = tuple(event.core for event in self.events if event.core)
        others = [event for event in self.events if not event.core and event.spelling != "manual"]
        return Truth(cores, tuple(Softmax(event.stack[-1], event.reason) for event in others))

    def _follow(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor], outputs: list[Tensor]) -> _Facts:
        """The facts about what `func` returned."""
        known = [self._get(tensor) for tensor in tensors]
        raw = all(fact.raw for fact in known)
        if func in CONTRACTIONS:
            return self._contract(*(args[position] for position in CONTRACTIONS[func]))
        if func in SOFTMAX:
            return _Facts(raw, weights=frozenset({self._event(SOFTMAX[func], known[0], outputs[0])}))
        if not _elementwise(func):
            return _Facts(raw)
        scored = any(fact.scored for fact in known)
        weights = frozenset[_Softmax]().union(*(fact.weights for fact in known))
        if func in EXPONENTIALS:
            weights |= {self._event("manual", known[0], outputs[0])}
        return _Facts(raw, scored, weights)

    def _event(self, spelling: Spelling, scores: _Facts, weights: Tensor) -> _Softmax:
        event = _Softmax(spelling, tuple(self.calls), scores.scored or spelling == "sdpa", weights)
        self.events.append(event)
        return event

    def _contract(self, left: Tensor, right: Tensor) -> _Facts:
        known = self._get(left), self._get(right)
        if not known[1].raw:
            self._weigh(left, known[0].weights)
        if not known[0].raw:
            self._weigh(right.mT if right.dim() > 1 else right, known[1].weights)
        return _Facts(raw=False, scored=not known[0].raw and not known[1].raw)

    def _weigh(self, weights: Tensor, events: frozenset[_Softmax]) -> None:
        """`weights` (..., queries, keys) is contracted with values along its last axis."""
        for event in events:
            if event.core or not event.scored or not event.weighs(weights):
                continue
            shown = event.weights if event.weights.shape[-1] == weights.shape[-1] else weights
            owner = _common(event.stack, tuple(self.calls))
            event.core = Core(owner, event.spelling, mask_kind(shown != 0), shown.shape[-2], shown.shape[-1])

    def _get(self, tensor: Tensor) -> _Facts:
        return self.facts.get(_key(tensor), _Facts())

    def _set(self, tensor: Tensor, facts: _Facts) -> None:
        self.alive.append(tensor)  # an address must not be given away a second time
        self.facts[_key(tensor)] = facts


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _elementwise(func: Any) -> bool:
    """In-place operators count as such: what a storage holds stays there."""
    return torch.Tag.pointwise in func.tags or func in MOVES or func._schema.is_mutable


def _common(one: Stack, other: Stack) -> str:
    """The innermost module that two calls have in common."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))][-1]


def mask_kind(reach: Tensor) -> str:
    """Name what a core masks. reach: (..., queries, keys) bool, True where a key has weight."""
    if reach.dim() < 2:
        return "other"
    patterns = reach.reshape(-1, *reach.shape[-2:])
    pattern, queries, keys = patterns[0], reach.shape[-2], reach.shape[-1]
    if not bool((patterns == pattern).all()):
        return "varied"
    if bool(pattern.all()):
        return "bidirectional"
    row, column = torch.arange(queries)[:, None], torch.arange(keys)
    width = int(pattern[-1].sum())
    if queries != keys or not torch.equal(pattern, (column <= row) & (column > row - width)):
        return "other"
    return "causal" if width == keys else f"sliding:{width}"


@contextmanager
def _call_stack(model: nn.Module) -> Generator[list[str]]:
    """The FQNs of the modules that are being called, outermost first."""
    calls: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    def leave(*_: Any) -> None:
        calls.pop()

    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave))
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_fast_path() -> Generator[None]:
    """nn.TransformerEncoder would run a whole layer as one operator."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
