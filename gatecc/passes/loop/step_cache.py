"""step_cache: of a model that runs again and again, only the samples that changed since its last call."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.errors import ArgumentError
from gatecc.ops import paths


@dataclass(eq=False)
class Steps:
    """How many calls there were, how often the model ran, and on how many samples of all that were given."""

    calls: int = 0
    runs: int = 0
    computed: int = 0
    given: int = 0


@contextmanager
def step_cache(model: nn.Module) -> Generator[Steps]:
    """Keep the outputs of a sampler's steps (RADD: a denoiser without a time, whose input seldom changes).

    Inside, a call runs the model on the samples that are not what they were in the call before, and on no others; if
    all are the same, the model is not called. The outputs of these are bitwise those of before. Anything else that is
    given (a number, a tensor without a row for each sample) must be the same too, else all samples run. Yields counts.

    Gradients are off inside. The first time that only some samples run, all of them do, to see that no sample depends
    on another. Raises ArgumentError if one does, for a model in training mode, and for outputs without a row for each
    sample.
    """
    calls = _Calls(model)
    try:
        with torch.no_grad():
            yield calls.steps
    finally:
        calls.handle()


class _Calls:
    """Stands around the forward of one model."""

    def __init__(self, model: nn.Module) -> None:
        if model.training:
            raise ArgumentError(
                "steps of a model in training mode are not the same twice",
                where=type(model).__name__,
                expected="a model without dropout and running statistics",
                do="model.eval()",
            )
        self.model, self.steps = model, Steps()
        self.signature = inspect.signature(model.forward)
        self.own, self.had = model.forward, "forward" in vars(model)
        self.leaves: list[Any] | None = None  # of the last call, with its outputs
        self.spec: Any = None
        self.outputs: list[Any] = []
        self.out_spec: Any = None
        self.checked = False
        model.forward = self.forward  # taken back by `handle`

    def handle(self) -> None:
        """Take it back."""
        if self.had:
            self.model.forward = self.own
        else:
            del self.model.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model."""
        leaves, spec = pytree.tree_flatten(dict(self.signature.bind(*args, **kwargs).arguments))
        rows = next((x.size(0) for x in leaves if isinstance(x, Tensor) and x.dim()), 0)
        changed = self._changed(leaves, spec, rows)
        count = rows if changed is None else int(changed.sum())
        self.steps.calls += 1
        self.steps.given += rows
        self.steps.computed += count
        if changed is None or count == rows:
            self._keep(self._run(leaves, spec), rows)
        elif count:
            self._some(leaves, spec, changed, rows)
        paths.note(paths.Taken("sample", (count,), max(rows, 1)))
        self.leaves, self.spec = [x.clone() if isinstance(x, Tensor) else x for x in leaves], spec
        return pytree.tree_unflatten([x.clone() if isinstance(x, Tensor) else x for x in self.outputs], self.out_spec)

    def _changed(self, leaves: list[Any], spec: Any, rows: int) -> Tensor | None:
        """Which samples (B,) are not what they were; None: all of them, or what they share."""
        if self.leaves is None or spec != self.spec or not rows:
            return None
        changed: Tensor | None = None
        for new, old in zip(leaves, self.leaves, strict=True):
            if not isinstance(new, Tensor) or not isinstance(old, Tensor):
                if isinstance(new, Tensor) or isinstance(old, Tensor) or new != old:
                    return None
            elif new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
                return None
            elif new.dim() and new.size(0) == rows:
                differs = (new != old).reshape(rows, -1).any(1)
                changed = differs if changed is None else changed | differs
            elif not torch.equal(new, old):
                return None
        return changed

    def _run(self, leaves: list[Any], spec: Any) -> Any:
        self.steps.runs += 1
        bound = self.signature.bind_partial()
        bound.arguments.update(pytree.tree_unflatten(leaves, spec))
        return self.own(*bound.args, **bound.kwargs)

    def _keep(self, result: Any, rows: int) -> None:
        self.outputs, self.out_spec = pytree.tree_flatten(result)
        for x in self.outputs:
            if isinstance(x, Tensor) and (not x.dim() or x.size(0) != rows):
                raise ArgumentError(
                    "an output does not have a row for each sample, so none of them can be kept",
                    where=type(self.model).__name__,
                    found=f"shape {tuple(x.shape)} for {rows} samples",
                    do="call the model without what it returns besides (a loss, a cache: use_cache=False)",
                )

    def _some(self, leaves: list[Any], spec: Any, changed: Tensor, rows: int) -> None:
        """Run the samples that changed, and put their outputs among the others."""
        at = changed.nonzero().squeeze(1)
        taken = [
            x.index_select(0, at) if isinstance(x, Tensor) and x.dim() and x.size(0) == rows else x for x in leaves
        ]
        found, spec_of_some = pytree.tree_flatten(self._run(taken, spec))
        if spec_of_some != self.out_spec:
            raise self._mixes(f"{len(found)} outputs for some samples, {len(self.outputs)} for all")
        joined = [
            old.index_copy(0, at.to(old.device), new) if isinstance(old, Tensor) else new
            for old, new in zip(self.outputs, found, strict=True)
        ]
        if not self.checked:
            whole = pytree.tree_leaves(self._run(leaves, spec))
            for one, other in zip(joined, whole, strict=True):
                if isinstance(one, Tensor) and not _close(one, other):
                    raise self._mixes(f"outputs that differ by {float((one - other).abs().max()):.2g}")
            self.checked = True
        self.outputs = joined

    def _mixes(self, found: str) -> ArgumentError:
        return ArgumentError(
            "a sample depends on the others of its batch",
            where=type(self.model).__name__,
            found=found,
            expected="a model that computes each sample by itself",
            do="call it without gatecc.step_cache",
        )


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()), equal_nan=True)
