"""Chooser: the router of an ensemble, with what the ensemble must know of it: what it reads, how outputs are put
together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.axes import Axes
from gatecc.ir.gates.layout import GateShape, SourceShape
from gatecc.ir.gates.source import Concat, Pool, Source, Stage
from gatecc.ir.router import Router, RouterSpec
from gatecc.passes.samples import check_one_row

FEATURES = "features"  # as a source: all features, or else all inputs that can be read
MEMBERS = "members"  # as a source: the outputs of all members


@dataclass(frozen=True)
class Form:
    """Shape and dtype of an input or output on the example."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(value: object) -> Form | None:
        """Of a tensor; None for anything else."""
        return Form(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None

    @property
    def axes(self) -> str:
        """One row per sample, then what ranks of tensors usually mean."""
        return {1: "b", 2: "bc", 3: "bnc", 4: "bcyx"}.get(len(self.shape), "")

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


class Chooser(Router):
    """A router with a row for each sample. ``forward(rows, *values)``: a tensor (B,), and the values that ``reads``
    names. ``combine`` and ``uniform`` say how outputs are put together."""

    uniform: Tensor | None

    def __init__(self, spec: RouterSpec, forms: Mapping[str, Form | None], experts: int, combine: str) -> None:
        self.reads = tuple(name_of(ref) for ref in spec.sources)
        shapes = tuple(
            _shape(name, forms, ref.cond is not None) for name, ref in zip(self.reads, spec.sources, strict=True)
        )
        shape = GateShape("b", {}, shapes)
        check_one_row(spec, shapes, "an ensemble")
        super().__init__(spec, shape, experts)
        self.combine = combine
        self.register_buffer("uniform", None)

    @property
    def k(self) -> int:
        """How many members a sample has at most."""
        return self.slots

    def read_rows(self, rows: Tensor, *values: Tensor) -> Tensor:
        """What the scorer reads, (B, C)."""
        read = self.spec.source.read(self.shape, self.shape.sources, rows, values)
        return read.x.expand(rows.size(0), -1)


def name_of(ref: object) -> str:
    """The input, feature or member that a source names: ``prompt`` and ``cond(prompt)`` are the same here."""
    return str(getattr(ref, "stage", None) or getattr(ref, "cond", None) or ref)


def read_all(
    source: Source,
    features: Sequence[str],
    members: Sequence[str],
    inputs: Sequence[str],
    forms: Mapping[str, Form | None],
) -> Source:
    """The source of a router with the words ``features`` and ``members`` replaced by all of them.

    Without any feature, that word means every input that is no index. What has tokens or pixels is averaged over them.
    Raises ArgumentError if there is nothing to read.
    """
    if not isinstance(source, Stage) or source.name not in (FEATURES, MEMBERS) or source.name in forms:
        return source
    names = members if source.name == MEMBERS else features
    names = names or [n for n in inputs if (form := forms.get(n)) is not None and form.dtype.is_floating_point]
    names = [n for n in names if (form := forms[n]) is not None and form.axes]
    if not names:
        raise ArgumentError(
            "the router has nothing to read",
            found=f"no features, and inputs that are indices: {', '.join(inputs)}",
            expected="a feature: a model whose output describes a sample",
            do='gatecc.ensemble(members, inputs, features={"prompt": encoder}), where the encoder may be the '
            "embedding of a member",
        )
    parts = tuple(_pooled(n, forms) for n in names)
    return parts[0] if len(parts) == 1 else Concat(parts)


def _pooled(name: str, forms: Mapping[str, Form | None]) -> Source:
    form = forms[name]
    return Pool(Stage(name)) if form is not None and len(form.shape) > 2 else Stage(name)


def _shape(name: str, forms: Mapping[str, Form | None], number: bool) -> SourceShape:
    """``number``: the source is written as cond(NAME), which may be a whole number per sample, such as a task."""
    if name not in forms:
        raise ArgumentError(
            "the router reads something that the ensemble does not have",
            found=name,
            expected=f"an input, a feature or a member: {', '.join(forms)}",
        )
    form = forms[name]
    if form is None or not form.axes:
        raise ArgumentError(
            "the router cannot read this",
            where=name,
            found="no tensor" if form is None else str(form),
            expected="a tensor of rank 1 to 4 with a row for each sample",
            do="take one part of the model's output: output={...}",
        )
    if not form.dtype.is_floating_point and not (number and len(form.shape) == 1):
        raise ArgumentError(
            "the router cannot read indices",
            where=name,
            found=str(form),
            expected="features; or one number per sample, as cond(NAME)",
            do='give a feature: features={"prompt": embedding}, inputs={"prompt": {"input": "input_ids"}}',
        )
    axes = Axes.of(form.axes)
    return SourceShape(axes, form.shape[axes.index("c")] if "c" in axes else 1)
