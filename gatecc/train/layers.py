"""Layers: which modules of student and teacher belong together, and what a layer of the teacher saw and yielded."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.errors import ArgumentError


@dataclass(eq=False)
class Seen:
    """The calls of one layer in one forward: (args, kwargs, output), all tensors copied."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = field(
        default_factory=list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]
    )


def is_scope(module: nn.Module) -> bool:
    """Whether a transform made the module a scope: it holds the state of one."""
    return "_gatecc" in vars(module)  # a model whose `generate` alone is served has a class of its own, too


def layers_of(student: nn.Module, teacher: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """The names of the layers to transfer. Raises ArgumentError if there are none, or the rewrite would not be seen.

    A module inside a scope runs as part of the scope's graph. Called by itself it would run as it was before the
    rewrite, so it is refused.
    """
    modules = dict(student.named_modules())
    if wanted is None:
        names = [n for n, m in modules.items() if n and is_scope(m)]
    else:
        names = [n for n in modules if n and any(fnmatchcase(n, glob) for glob in wanted)]
    if not names:
        raise ArgumentError(
            "there are no layers to transfer",
            found=f"layers={wanted}; {type(student).__name__} has no rewritten layer of that name",
            do='name them (layers=("model.layers.*.self_attn",)), or transform without scope="model"',
        )
    theirs = dict(teacher.named_modules())
    for name in names:
        if name not in theirs:
            raise ArgumentError("the teacher has no such layer", where=name, expected="the same name in both models")
        parents = ["", *(name[:i] for i, c in enumerate(name) if c == ".")]
        above = next((p for p in parents if is_scope(modules[p])), None)
        if above is not None:
            raise ArgumentError(
                "the layer runs inside a larger rewritten module",
                where=name,
                found=f"{above or 'the whole model'} is one graph",
                do="transfer that module",
            )
    return names


@contextmanager
def recorded(teacher: nn.Module, names: Sequence[str]) -> Generator[dict[str, Seen]]:
    """Fill in what the layers of the teacher see and yield while it runs inside the block."""
    seen = {name: Seen() for name in names}
    handles = [teacher.get_submodule(n).register_forward_hook(_hook(s), with_kwargs=True) for n, s in seen.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def yields(model: nn.Module, names: Sequence[str]) -> Generator[dict[str, list[Tensor]]]:
    """Fill in what the layers of a model yield while it runs inside the block: copies, through which gradients flow."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[name].append(first_tensor(output, name).clone())

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def match_loss(
    student: dict[str, list[Tensor]], teacher: dict[str, list[Tensor]], keep: Tensor | None = None
) -> Tensor:
    """The mean over layers of the squared difference of what they yield, relative to the teacher's mean square.

    ``keep`` (B, N): the tokens that count, in layers that yield (B, N, ...). Raises ArgumentError if a layer ran in one
    model more often than in the other, or in neither.
    """
    losses: list[Tensor] = []
    for name, yielded in student.items():
        if not yielded or len(yielded) != len(teacher[name]):
            raise ArgumentError(
                "a layer did not run alike in both models",
                where=name,
                found=f"{len(yielded)} calls in the student, {len(teacher[name])} in the teacher",
                expected="the same number of calls, one or more",
                do="name layers that every forward runs, in layers=(...)",
            )
        for got, want in zip(yielded, teacher[name], strict=True):
            want = want.to(got.device)
            if keep is not None and got.shape[:2] == want.shape[:2] == keep.shape:
                mask = keep.to(got.device)
                got, want = got[mask], want[mask]
            losses.append(relative(got, want, name))
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def relative(got: Tensor, want: Tensor, name: str) -> Tensor:
    """The mean squared difference over the mean square of what is wanted. Raises ArgumentError if shapes differ."""
    if got.shape != want.shape:
        raise ArgumentError(
            "the layers' outputs differ in shape",
            where=name,
            found=f"{tuple(got.shape)} and {tuple(want.shape)}",
            expected="the same shape in student and teacher",
            do="leave this layer out of layers=(...)",
        )
    want = want.float()
    return (got.float() - want).square().mean() / want.square().mean().clamp_min(1e-12)


def transfer_loss(layer: nn.Module, seen: Seen, name: str) -> Tensor:
    """The mean squared difference of a layer's output from the teacher's, over the teacher's mean square."""
    total = torch.zeros(())
    for args, kwargs, want in seen.calls:
        error = relative(first_tensor(layer(*args, **kwargs), name), want, name)
        total = total.to(error.device) + error / len(seen.calls)
    return total


def first_tensor(output: Any, name: str) -> Tensor:
    """The first floating tensor of an output: what a layer hands on. Raises ArgumentError if there is none."""
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise ArgumentError("a layer yields no tensor", where=name, found=type(output).__name__)


def _hook(seen: Seen) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Copies: a residual stream that is added to in place would be another value by the time the student reads it.
        copied = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        seen.calls.append((*copied, first_tensor(output, type(module).__name__).detach().clone()))

    return hook
