"""expert_parallel: the experts of a model over the ranks of a mesh, in one call."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gatecc.errors import ArgumentError, EmptySelectionError
from gatecc.ir.scoped import scopes_around
from gatecc.ir.weights import joined
from gatecc.parallel.dispatch import AllToAll, Dispatcher, Setting, register
from gatecc.parallel.operator import SETTINGS
from gatecc.parallel.stock import is_stock, run_by_operator

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
STACKED = dict.fromkeys(MATRICES, 3) | {f"{name}_bias": 2 for name in MATRICES}  # axes of each
_BY_OPERATOR = ("route", "fuse_experts")  # rewrites whose graphs run gatecc::moe_ffn
IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks for names


def expert_parallel(
    model: nn.Module,
    mesh: DeviceMesh,
    dispatcher: str | Dispatcher = AllToAll.name,
    *,
    axis: int | str = -1,
    gradients: Literal["mean", "sum"] = "mean",
    experts: Sequence[str] = ("*",),
) -> nn.Module:
    """Shard the experts of a model over a mesh, in place: rank r of W keeps experts rE/W to (r+1)E/W - 1 of each layer.

    Weights of experts become DTensors under their own names, so state dicts, optimisers and captured graphs stay as
    they are; `torch.distributed.checkpoint` gathers the full state dict, which is that of the unsharded model. Make
    optimisers afterwards. Experts that transformers dispatches (Mixtral, Qwen-MoE, gpt-oss, ...) run as
    ``gatecc::moe_ffn`` from then on, whatever their `experts_implementation` was. For all other parameters use DDP, or
    FSDP2 with ``fully_shard(model, ignored_params=set(expert_parameters(model)))``.

    Args:
        model: one with stacked experts that ``gatecc::moe_ffn`` runs or that are a class of transformers; on the meta
            device as well.
        mesh: of one axis; or of two, along one of which experts are sharded and along the other repeated.
        dispatcher: "all-to-all" (each rank has tokens of its own), "all-gather" (the same with fixed sizes), or
            "all-reduce" (all ranks of the axis have the same tokens); or a `Dispatcher`.
        axis: of a mesh with two, the one that experts are sharded along: its number or name.
        gradients: "mean" over the ranks, as DDP and FSDP have those of other parameters; or "sum".
        experts: globs of the names of modules of experts, all by default.

    Returns the model. Raises ArgumentError if W does not divide E, if a module's experts are sharded already, are no
    formula of the operator, or are read by a rewritten graph without it, or if the mesh is used with other settings;
    EmptySelectionError if there are no experts.
    """
    axis = _axis_of(mesh, axis)
    if not isinstance(dispatcher, str):
        register(dispatcher)
    setting = Setting(dispatcher if isinstance(dispatcher, str) else dispatcher.name, gradients == "mean")
    found = [name for name, _ in _modules(model) if any(fnmatch.fnmatchcase(name, glob) for glob in experts)]
    if not found:
        raise EmptySelectionError(
            "the model has no such experts",
            found=", ".join(name for name, _ in _modules(model)) or "no module with gate_up_proj (E, 2F, d)",
            expected=", ".join(experts),
            do="upcycle it first: gatecc.transform(model, ...)",
        )
    for name in found:
        _check(name, model.get_submodule(name), mesh, axis)
    if SETTINGS.setdefault(mesh, setting) != setting:
        raise ArgumentError(
            "the mesh holds experts with other settings",
            found=str(SETTINGS[mesh]),
            expected=str(setting),
            do="make a mesh of its own: init_device_mesh with other mesh_dim_names",
        )
    for name in found:
        if is_stock(model.get_submodule(name)) and not _in_graph(model, name):
            run_by_operator(model, name)
    placements = [Shard(0) if i == axis else Replicate() for i in range(mesh.ndim)]
    names: list[str] = []
    for name in found:
        module = model.get_submodule(name)
        for leaf, parameter in _stacked(module):
            whole = distribute_tensor(parameter.detach(), mesh, placements)
            module.register_parameter(leaf, nn.Parameter(whole, requires_grad=parameter.requires_grad))
            names.append(f"{name}.{leaf}".lstrip("."))
    vars(model)[IGNORED] = [*vars(model).get(IGNORED, ()), *names]
    return model


def expert_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that `expert_parallel` has sharded: those that ``fully_shard`` is to ignore."""
    for _, module in _modules(model):
        yield from (p for _, p in _stacked(module) if isinstance(p, DTensor))


def _axis_of(mesh: DeviceMesh, axis: int | str) -> int:
    names = mesh.mesh_dim_names or ()
    if isinstance(axis, str):
        if axis not in names:
            raise ArgumentError("the mesh has no such axis", found=axis, expected=", ".join(names) or "axes with names")
        return names.index(axis)
    if not -mesh.ndim <= axis < mesh.ndim:
        raise ArgumentError("the mesh has no such axis", found=str(axis), expected=f"less than {mesh.ndim}")
    return axis % mesh.ndim


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold stacked experts."""
    for name, module in model.named_modules():
        held = dict(_stacked(module))
        if "down_proj" in held and ("gate_up_proj" in held or "up_proj" in held):
            yield name, module


def _in_graph(model: nn.Module, name: str) -> bool:
    """Whether rewritten graphs run these experts. Raises ArgumentError if they do so without the operator."""
    inside = False
    for around, state in scopes_around(model, name):
        inside = True
        for application in state.applied:
            owners = [joined(around, owner) for owner, _ in application.sites]
            if application.rewrite.name in _BY_OPERATOR and any(f"{name}.".startswith(f"{o}.") for o in owners):
                return True
    if inside:
        raise ArgumentError(
            "a rewritten graph dispatches tokens to these experts",
            where=name,
            found="the dispatch of transformers, which cannot be sharded",
            expected="gatecc::moe_ffn",
            do='gatecc.transform(model, "fast-experts", inputs) before expert_parallel',
        )
    return False


def _stacked(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for leaf, axes in STACKED.items():
        parameter = module._parameters.get(leaf)
        if parameter is not None and parameter.dim() == axes:
            yield leaf, parameter


def _check(name: str, module: nn.Module, mesh: DeviceMesh, axis: int) -> None:
    ranks = mesh.size(axis)
    for leaf, parameter in _stacked(module):
        where = f"{name}.{leaf}".lstrip(".")
        if isinstance(parameter, DTensor):
            raise ArgumentError("experts are sharded already", where=where, found=str(parameter.placements))
        if parameter.shape[0] % ranks:
            raise ArgumentError(
                "the mesh does not divide the experts",
                where=where,
                found=f"{parameter.shape[0]} experts over {ranks} ranks",
                expected=f"a multiple of {ranks}",
                do="take a smaller mesh for the experts and data parallelism for the rest: mesh of two axes",
            )
