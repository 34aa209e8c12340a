"""condition_cache: the tokens of conditions are computed once, and later calls go on without them."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from gatecc.errors import ArgumentError
from gatecc.ops.in_segments import Kept, keeping


@contextmanager
def condition_cache(model: nn.Module, segment: str = "segment") -> Generator[Kept]:
    """Keep the keys and values of conditions over the steps of a denoiser (`easycontrol`, or the rewrite segment_mask).

    A call with tokens of conditions computes them and keeps their keys and values; a call whose ``segment`` is 0
    everywhere has the other tokens alone, and sees those that were kept. Its outputs are those of the call with all
    tokens, at its own. Yields a count: ``computed`` and ``reused``.

    Gradients are off inside. The first call is done a second time with other tokens in the place of those of segment 0,
    to see that no condition depends on them; inputs without a row for each token, such as a timestep that reaches the
    conditions, must be the same in later calls. Raises ArgumentError otherwise, for attention that is spelled out or
    has a mask of its own, and for a compiled model.
    """
    calls = _Calls(model, segment)
    try:
        with torch.no_grad():
            yield calls.kept
    finally:
        calls.handle()


class _Calls:
    """Stands around the forward of one model."""

    def __init__(self, model: nn.Module, segment: str) -> None:
        self.model, self.segment, self.kept = model, segment, Kept()
        self.signature = inspect.signature(model.forward)
        self.others: dict[str, Any] = {}
        self.checked = False
        self.own, self.had = model.forward, "forward" in vars(model)
        model.forward = self.forward  # taken back by `handle`

    def handle(self) -> None:
        """Take it back."""
        if self.had:
            self.model.forward = self.own
        else:
            del self.model.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model."""
        given = self.signature.bind(*args, **kwargs).arguments
        self.kept.start()
        with keeping(self.kept):
            result = self.own(*args, **kwargs)
        if not self.kept.at:
            raise ArgumentError(
                "the call came to no attention that keeps conditions",
                where=type(self.model).__name__,
                expected="a model that gatecc rewrote with segment_mask, which runs by itself and not compiled",
                do='gatecc.transform(model, "easycontrol", inputs)',
            )
        if self.kept.reads:
            self._same(given)
            self.kept.reused += 1
            return result
        self.others = {name: given[name] for name in self.kept.others if name in given}
        if not self.checked:
            self._check(given)
        self.kept.computed += 1
        return result

    def _same(self, given: Mapping[str, Any]) -> None:
        """What the conditions read beside their tokens is what it was."""
        for name in sorted(self.kept.others | set(self.others)):
            if not _equal(given.get(name), self.others.get(name)):
                raise ArgumentError(
                    "conditions were kept that depend on an input which is another one now",
                    where=name,
                    expected="what it was when they were computed",
                    do="call the model with all tokens again, or keep this input from the tokens of conditions",
                )

    def _check(self, given: dict[str, Any]) -> None:
        """Do it again with other tokens of segment 0: what was kept must be the same."""
        segment, again = given[self.segment], Kept()
        changed = dict(given)
        for name in self.kept.tokens - {self.segment}:
            x = given.get(name)
            if isinstance(x, Tensor):
                image = (segment == 0).view(*segment.shape, *[1] * (x.dim() - 2))
                changed[name] = torch.where(image, x.roll(1, 1).flip(0), x)
        bound = self.signature.bind_partial()
        bound.arguments.update(changed)
        with keeping(again):
            self.own(*bound.args, **bound.kwargs)
        for (k, v), (other_k, other_v) in zip(self.kept.layers, again.layers, strict=True):
            for one, other in ((k, other_k), (v, other_v)):
                if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
                    raise ArgumentError(
                        "what a condition computes depends on tokens of segment 0",
                        where=type(self.model).__name__,
                        found="other keys and values of a condition when these tokens were changed",
                        expected="a model that mixes tokens in attention alone",
                        do="call the model with all tokens in every step",
                    )
        self.checked = True


def _equal(one: Any, other: Any) -> bool:
    """Whether two inputs are the same, tensor by tensor."""
    (xs, spec), (ys, its_spec) = tree_flatten(one), tree_flatten(other)
    if spec != its_spec:
        return False
    for x, y in zip(xs, ys, strict=True):
        both = isinstance(x, Tensor) and isinstance(y, Tensor)
        if not (torch.equal(x, y) if both else type(x) is type(y) and x == y):
            return False
    return True
