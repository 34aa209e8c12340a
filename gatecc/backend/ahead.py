"""Ahead of time: a lowered model as an ExportedProgram, for torch._inductor.aoti_compile_and_package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from gatecc.backend.lower import lower_program
from gatecc.backend.options import Options
from gatecc.capture import capture
from gatecc.capture.exported import exported_program
from gatecc.capture.signature import split_inputs
from gatecc.engine.analyse import check_model, check_runs, evaluation
from gatecc.errors import ExportError
from gatecc.ir.program import Program, origin
from gatecc.passes.lower import Settings
from gatecc.pipeline import canonical_form

Inputs = Any  # a tuple, a dict, or (tuple, dict)


def lowered_program(
    model: nn.Module, example_inputs: Inputs, *, options: Mapping[str, Any] | None = None, python: bool = False
) -> ExportedProgram:
    """The model in eval mode as a lowered ExportedProgram of ATen operators, with free sizes where the model allows it.

    It takes the tensors of ``example_inputs`` as these are handed over, positional or by keyword; Python values among
    them are fixed. A package that is compiled from it runs without Python, where kernels of gatecc cannot be reached
    (they are called through Python): lowerings that would need one are left out. With ``python`` they are done, and the
    package is for processes of Python that import gatecc before they load it; elsewhere it is refused when it is loaded
    ("Could not find schema for gatecc::attention").

    Raises ExportError, with the name of the operator, if the model itself calls one of gatecc's and it is not for
    ``python``, and CaptureError if the model cannot be captured whole.
    """
    args, kwargs = split_inputs(example_inputs)
    check_model(model)
    settings = Settings(only=Options.of(options or {}).lowerings)

    def read() -> Program:
        return canonical_form(capture(model, args, kwargs))

    with evaluation(model), torch.no_grad():
        check_runs(model, args, kwargs)
        if own := {} if python else _kernels(read()):
            name, node = next(iter(own.items()))
            raise ExportError(
                "the model calls an operator that is reached through Python alone, and a compiled package has none",
                where=origin(node).owner,
                found=name,
                do="python=True for a package that is loaded where gatecc is imported; else "
                'torch.compile(model, backend="gatecc"), or gatecc.export, which writes it as ONNX',
            )
        without: set[str] = set()
        while True:
            program = lower_program(read, settings, without=without).program
            blamed = set[str]() if python else {origin(node).inserted_by for node in _kernels(program).values()}
            if not blamed:
                return exported_program(program, _structure(args, kwargs))
            without |= blamed


def _kernels(program: Program) -> dict[str, fx.Node]:
    """The operators of gatecc in a program, each with its first call."""
    found: dict[str, fx.Node] = {}
    for node in program.calls():
        if isinstance(node.target, OpOverload) and node.target.namespace in ("gatecc", "gatecc_regions"):
            found.setdefault(str(node.target), node)
    return found


def _structure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> pytree.TreeSpec | None:
    """The structure of a call without what is no tensor; None, for a flat one, if that stands between tensors."""

    def whole(value: Any) -> bool:
        return all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))

    named = {name: value for name, value in kwargs.items() if whole(value)}
    rest = [value for name, value in kwargs.items() if name not in named]
    if not whole(args) or any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(rest)):
        return None
    return pytree.tree_structure((args, named))
