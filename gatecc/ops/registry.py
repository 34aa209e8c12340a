"""Registry: what others may know of an operator, entered by the operator's own package.

Decoder, ONNX and cost ask here and know no operator by name, so a new operator is one package and needs no edit
elsewhere. An operator of torch that stays whole in a graph (``aten.lstm``) may be entered as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.errors import ArgumentError
from gatecc.ops.paths import Taken

Target = Literal["ort", "portable", "opset27"]
"""Of an ONNX graph: with the operators of ONNX Runtime (com.microsoft), with those of the standard alone, or with those
that the standard has since opset 27."""


class Carry(NamedTuple):
    """One tensor of an operator's state: the argument that a call starts from, and the output that is its next value.

    The argument is optional (None is zero), a tensor, or with ``item`` one of a list. A ``ragged`` one has no axis of
    samples and gets longer as it likes; a step may write behind what is in use of it, as keys are.
    """

    argument: str
    output: int
    item: int | None = None
    ragged: bool = False


class Unfit(NamedTuple):
    """Why a call has no step, and what the user can do."""

    reason: str
    do: str = ""


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """How an operator runs token by token; functions are given its node in a captured graph.

    ``operand`` is the argument along whose ``axis`` values are combined: a step starts there from the state that the
    call before it has returned, so that tokens may come in pieces of any length. Along all other axes the operator does
    the same at each place. Without ``carries`` it may not run along the tokens at all; without an ``axis`` it combines
    nothing.
    """

    operand: str
    axis: int | Callable[[fx.Node], int] | None
    carries: tuple[Carry, ...] = ()
    unfit: Callable[[fx.Node], Unfit | None] = lambda node: None
    one_token: Callable[[fx.Node], Callable[..., Any] | None] = lambda node: None
    """What computes exactly one token faster, with the operator's arguments and results; None: the operator itself."""
    reordered: Callable[[fx.Node, Sequence[torch.Tensor], torch.Tensor], Sequence[torch.Tensor]] | None = None
    """For a state with ragged parts: given all its parts and an index (B,), the state in which sample i has what sample
    ``index[i]`` had. Others are taken along their axis of samples."""

    def axis_of(self, node: fx.Node) -> int | None:
        """The axis of the operand in one call."""
        return self.axis(node) if callable(self.axis) else self.axis


@dataclass(frozen=True, kw_only=True, eq=False)
class Operator:
    """An operator's entry.

    ``kernels``: what serves it on a device type, in a protocol of its own. ``onnx``: its form for a target; one for
    ``portable`` serves all. ``flops`` is a formula as torch's counter knows them: it takes the operator's arguments,
    shapes in the place of tensors. ``bytes`` takes tensors without storage, and is needed only where an operator does
    not read all of its inputs once and write its outputs once.

    ``served`` is of an operator whose work depends on values: given the arguments of a call, the stacked weights of its
    experts, how many of them tokens met in all, and how many there would be if each token met every one; None for a
    call that has nothing to leave out. ``flops``
    then takes the number of slots that are not empty as ``slots``, where it is known; so does ``bytes``, if it wants.
    ``taken`` is of the same operators: given the arguments of a call and its result as ``out``, which units it took;
    None if it took them all or the values are not known. ``masked`` computes every unit and masks, with the same
    arguments and result: what the skipping form is measured against (`gatecc.cost`).
    """

    overload: OpOverload
    step: StepRule | None = None
    onnx: Mapping[Target, Lowering] = field(default_factory=dict[Target, Lowering])
    flops: Callable[..., int] | None = None
    bytes: Callable[..., int] | None = None
    kernels: Mapping[str, Any] = field(default_factory=dict[str, Any])
    served: Callable[..., tuple[tuple[Any, ...], int, int] | None] | None = None
    taken: Callable[..., Taken | None] | None = None
    masked: Callable[..., Any] | None = None


_OPERATORS: dict[Any, Operator] = {}
_LATER: dict[str, Callable[[OpOverload], Operator]] = {}


def register(operator: Operator) -> None:
    """Enter an operator. Raises ArgumentError if it is there already."""
    if operator.overload in _OPERATORS:
        raise ArgumentError(
            "an operator is registered twice", found=str(operator.overload), do="give it another name, or change it"
        )
    _OPERATORS[operator.overload] = operator
    packet, formula = operator.overload.overloadpacket, operator.flops
    if formula is None or operator.overload.namespace == "aten":  # torch's counter takes its own operators apart
        return
    served = operator.served
    if served is None:
        register_flop_formula(packet)(lambda *args, out_shape, **options: formula(*args, **options))
        return

    def by_slots(*args: Any, out_val: Any, **options: Any) -> int:
        shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in args]
        found = served(*args, **options)
        return formula(*shapes, **options, **({} if found is None else {"slots": found[1]}))

    register_flop_formula(packet, get_raw=True)(by_slots)


def register_later(name: str, entry: Callable[[OpOverload], Operator]) -> None:
    """Enter an operator of a library that may not be imported yet (``transformers::grouped_mm_fallback``)."""
    _LATER[name] = entry


def find(target: object) -> Operator | None:
    """The entry of what a node calls."""
    if _LATER and target not in _OPERATORS:
        _settle()
    return _OPERATORS.get(target)


def operators() -> Iterator[Operator]:
    """All entries, in the order in which they came."""
    _settle()
    return iter(_OPERATORS.values())


def _settle() -> None:
    """Enter the operators that their libraries have defined by now."""
    for name in list(_LATER):
        namespace, operator = name.split("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:
            register(_LATER.pop(name)(packet.default))


def lowerings(target: Target) -> dict[Any, Lowering]:
    """The ONNX forms for a target, by overload."""
    found = {o.overload: o.onnx.get(target) or o.onnx.get("portable") for o in operators()}
    return {overload: lowering for overload, lowering in found.items() if lowering is not None}
