"""Analysis: the capture ladder and the sites that it yields; `inspect` is its public face."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gatecc.capture import capture
from gatecc.capture.compiled import behind, refuse_compiled
from gatecc.capture.record import RecordedCall, record_calls
from gatecc.capture.shield import callers_device, shielded
from gatecc.capture.signature import copied, split_inputs
from gatecc.capture.wrappers import refuse_wrapped
from gatecc.engine.measured import Measured, measured, shares
from gatecc.engine.put_off import buffers_on_meta, moved, on_meta
from gatecc.errors import CaptureError, ExampleInputsError, UnsupportedModelError
from gatecc.ir.program import Program
from gatecc.ir.refusals import fitted
from gatecc.ir.site import MLP, Refusal, Site
from gatecc.ir.weights import modules_of
from gatecc.passes.route.experts import Experts
from gatecc.pipeline import Stage, prepare
from gatecc.pipeline.cost import cost
from gatecc.report import GraphDump, GraphPair, PassRow, Report, RungRow, SiteRow, Totals
from gatecc.scope.one_token import with_longer_masks
from gatecc.scope.scope import plain

Inputs = Any  # a tuple, a dict, or (tuple, dict)
PACKED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)  # what libraries keep quantised weights in


@dataclass
class Analysis:
    """Everything that is known of a model before a rewrite: captured programs, sites, refusals, and how they were
    had."""

    programs: list[Program] = field(default_factory=list[Program])
    sites: list[Site] = field(default_factory=list[Site])
    refusals: list[Refusal] = field(default_factory=list[Refusal])
    rungs: list[RungRow] = field(default_factory=list[RungRow])
    passes: list[PassRow] = field(default_factory=list[PassRow])

    def program_of(self, site: Site) -> Program:
        """The program that holds a site."""
        node = next(iter(site.values.values())).node
        return next(p for p in self.programs if p.graph is node.graph)


@shielded
def inspect(model: nn.Module, example_inputs: Inputs) -> Report:
    """Find every site of a model, and say of every place that looks like one why it is none. The model is not changed.

    ``example_inputs``: a tuple is positional, a dict is keyword arguments, ``(tuple, dict)`` is both.
    Raises ExampleInputsError, UnsupportedModelError, CaptureError (if not even a submodule can be captured).
    """
    args, kwargs = split_inputs(example_inputs)
    model = behind(model)
    check_model(model, empty=True)
    if not on_meta(model):
        with evaluation(model):
            analysis = analyse(model, args, kwargs)
            return report_of(model, analysis, measured(model, analysis.programs, args, kwargs))
    with buffers_on_meta(model), evaluation(model):
        return report_of(model, analyse(model, *moved((args, kwargs), "meta")))


def report_of(model: nn.Module, analysis: Analysis, ran: Measured | None = None) -> Report:
    """The report of an analysis alone. ``ran``: what ran on the example inputs, where that depends on data."""
    costs = [cost(p) for p in analysis.programs]
    flops = sum(c.flops for c in costs)
    traffic = sum(c.bytes for c in costs)
    return Report(
        model=type(model).__name__,
        sites=[SiteRow.of(s) for s in analysis.sites],
        refusals=analysis.refusals,
        rungs=analysis.rungs,
        passes=analysis.passes,
        graphs=[GraphPair((p.fqn,), GraphDump.of(p)) for p in analysis.programs],
        totals=Totals(
            parameters_before=parameter_count(model),
            flops_before=flops if ran is None or ran.flops is None else ran.flops,
            bytes_before=traffic,
            active_before=active_count(model, analysis.sites, ran),
        ),
    )


def parameter_count(model: nn.Module) -> int:
    """The number of parameter elements, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def active_count(model: nn.Module, sites: Sequence[Site], ran: Measured | None = None) -> int | None:
    """The number of parameter elements that a token meets; None where nothing chooses among experts.

    ``sites``: those of the model, with experts that it has of itself; the experts of rewrites are found as modules. As
    many count as have a slot, and where it ran, as many as tokens met on average.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    idle: dict[str, float] = {}
    for site in sites:
        if isinstance(site, MLP) and site.chosen:
            stacks = [name for role, w in site.weights.items() if role != "router" for name in (w.fqn, w.bias) if name]
            idle |= _idle(parameters, stacks, site.chosen, site.experts)
    for fqn, module in model.named_modules():
        if isinstance(module, Experts) and module.chosen:
            stacks = [f"{fqn}.{n}".lstrip(".") for n, p in module.named_parameters() if n != "bias" and p.dim() > 1]
            idle |= _idle(parameters, stacks, module.chosen, module.down_proj.size(0))
    met = dict(shares(model, ran)) if ran is not None else {}
    idle |= {name: (1 - share) * parameters[name].numel() for name, share in met.items()}
    return parameter_count(model) - round(sum(idle.values())) if idle else None


def _idle(parameters: Mapping[str, nn.Parameter], names: Iterable[str], chosen: int, experts: int) -> dict[str, float]:
    """The elements of stacked weights that a token does not meet."""
    return {n: (1 - min(chosen, experts) / experts) * parameters[n].numel() for n in names if n in parameters}


def check_model(model: object, *, empty: bool = False) -> None:
    """Raise UnsupportedModelError for what gatecc cannot rewrite: scripted or wrapped modules, packed weights, and
    weights on the meta device unless the model may be ``empty``."""
    if isinstance(model, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        raise UnsupportedModelError(
            "a scripted module has no Python forward",
            found=type(model).__name__,
            do="pass the nn.Module that the script was made from",
        )
    if not isinstance(model, nn.Module):
        do = "pass program.module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise UnsupportedModelError("not a model", found=type(model).__name__, expected="a torch.nn.Module", do=do)
    refuse_compiled(model)
    refuse_wrapped(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _check_tensor(name, tensor, empty)
        if isinstance(tensor, nn.Parameter) and tensor.dtype in PACKED:
            raise _quantised(name, str(tensor.dtype))
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError("a submodule is scripted", where=name, do="use the Python module in its place")
        if ".quantized" in type(module).__module__:
            raise _quantised(name, f"{type(module).__module__}.{type(module).__name__}")


def check_in_place(model: nn.Module) -> None:
    """Raise UnsupportedModelError for parameters of inference mode: what is computed with them has no gradient."""
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise UnsupportedModelError(
                "the model was made under torch.inference_mode: no gradient goes through its parameters",
                where=name,
                found="inplace=True, which would leave them as they are",
                do="make the model outside of it; without inplace=True the result is a copy with ordinary parameters",
            )


def _check_tensor(name: str, tensor: torch.Tensor, empty: bool) -> None:
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        raise UnsupportedModelError(
            "the model holds weights that are made on its first call",
            where=name,
            found=type(tensor).__name__,
            do="call the model once, then transform it",
        )
    if type(tensor.data).__name__ in ("DTensor", "NestedTensor"):
        raise UnsupportedModelError(
            "the model holds a weight of a class that gatecc cannot read",
            where=name,
            found=f"{type(tensor.data).__module__}.{type(tensor.data).__name__}",
            expected="plain tensors, or quantised ones of torchao",
            do="transform the model first, then distribute it (parallelize_module, fully_shard)",
        )
    if tensor.is_meta and not empty:
        raise UnsupportedModelError(
            "the model is on the meta device: it has no weights to compute with",
            where=name,
            found="device meta",
            do="load the weights first: gatecc.materialise(model, weights) for a transformed model, "
            "load_state_dict(..., assign=True) for others",
        )
    if tensor.is_quantized or not (
        tensor.dtype.is_floating_point or tensor.dtype.is_complex or not tensor.requires_grad
    ):
        raise _quantised(name, str(tensor.dtype))


def _quantised(name: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        "the model holds quantised weights",
        where=name,
        found=found,
        expected="float32, float64, bfloat16 or float16 weights",
        do="transform the model first and quantise the result",
    )


def evaluation(model: nn.Module) -> _InMode:
    """A context in which the model is in eval mode; afterwards its modules have their modes and its buffers their
    values back: a forward may count its calls."""
    return _InMode(model, False)


def in_mode(model: nn.Module, training: bool) -> _InMode:
    """The same for train or eval mode. The model's own train() is not called: it may merge weights."""
    return _InMode(model, training)


def as_it_is(model: nn.Module) -> _InMode:
    """A context in which the model keeps the modes that its modules have."""
    return _InMode(model, None)


class _InMode:
    def __init__(self, model: nn.Module, training: bool | None) -> None:
        self.model = model
        self.wanted = training

    def __enter__(self) -> None:
        self.modules = [(m, m.training) for m in modules_of(self.model)]
        self.buffers = [(m, n, b, b.clone()) for m, _ in self.modules for n, b in m._buffers.items() if b is not None]
        for m, was in self.modules:
            m.training = was if self.wanted is None else self.wanted

    def __exit__(self, *error: object) -> None:
        self._restore(self.model, {id(m): was for m, was in self.modules}, self.model.training)
        for module, was in self.modules:  # also of those that were taken out meanwhile
            module.training = was
        with torch.no_grad():
            for module, name, buffer, before in self.buffers:
                if module._buffers.get(name) is not None:  # else it was taken out meanwhile
                    module._buffers[name] = buffer
                if not buffer.is_meta and not torch.equal(buffer, before):
                    buffer.copy_(before)

    def _restore(self, module: nn.Module, before: dict[int, bool], holder: bool) -> None:
        module.training = before.get(id(module), holder)  # modules made meanwhile follow their holder
        for child in module.children():
            self._restore(child, before, module.training)


def analyse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Analysis:
    """Climb down the ladder: the whole model if torch.export takes it, else the largest submodules that it takes.

    Earlier transforms are left out: their graphs hide the modules that they run, and the rewrites of a scope are all
    done on the module's own graph.
    """
    with plain(model):
        analysis = _analyse(model, args, kwargs)
    kinds = {site.kind for site in analysis.sites}
    analysis.refusals = [fitted(refusal, kinds) for refusal in analysis.refusals]
    return analysis


def _analyse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Analysis:
    analysis = Analysis()
    clock = time.process_time()
    try:
        program = capture(model, args, kwargs, hooked=())
    except CaptureError as whole:
        check_runs(model, args, kwargs)
        analysis.rungs.append(RungRow("", "python", whole.found))
        _descend(model, args, kwargs, whole, analysis)
        analysis.refusals.extend(_unseen(row) for row in analysis.rungs if row.rung == "python")
        analysis.passes.append(PassRow("capture", (time.process_time() - clock) * 1e3))
        return analysis
    analysis.passes.append(PassRow("capture", (time.process_time() - clock) * 1e3, 0, len(program.graph.nodes)))
    analysis.rungs.append(RungRow("", "whole"))
    add_program(analysis, program)
    analysis.sites = with_longer_masks(model, args, kwargs, analysis.sites)
    return analysis


def _unseen(row: RungRow) -> Refusal:
    """The refusal of a module whose own code stays in Python: what it does besides its captured children is not
    seen."""
    reason = f"the module's own code could not be captured: {row.reason}"
    remedy = "write it without decisions that depend on data (torch.where, torch.cond), or select sites elsewhere"
    return Refusal(CaptureError.code, "module", row.fqn, "", reason, remedy)


def add_program(analysis: Analysis, program: Program) -> None:
    """Prepare a captured program and add its sites."""

    def row(stage: Stage) -> None:
        analysis.passes.append(PassRow(stage.name, stage.seconds * 1e3, stage.nodes, len(stage.program.graph.nodes)))

    prepared = prepare(program, row)
    analysis.programs.append(program)
    analysis.sites.extend(prepared.found)
    analysis.refusals.extend(prepared.refusals)


def check_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ExampleInputsError if the model does not run on the inputs."""
    try:
        with torch.no_grad(), callers_device():
            args, kwargs = copied((args, kwargs))
            model(*args, **kwargs)
    except Exception as e:
        raise ExampleInputsError(
            "the model does not run on the example inputs",
            where=type(model).__name__,
            found=f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}",
            expected="inputs with which model(*args, **kwargs) runs",
            do="call the model with them once by hand; a tuple is positional, a dict is keyword arguments",
        ) from e


def _descend(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], whole: CaptureError, analysis: Analysis
) -> None:
    calls, _ = record_calls(model, [name for name, _ in model.named_modules() if name], args, kwargs)
    todo = [name for name, _ in model.named_children()]
    while todo:
        name = todo.pop(0)
        if name not in calls:  # a module that has another name, too
            continue
        module = model.get_submodule(name)
        children = [f"{name}.{child}" for child, _ in module.named_children()]
        if not calls[name]:  # a container that is never called itself
            todo[:0] = children
            continue
        failure = _submodule(module, name, calls[name][0], whole, analysis)
        if failure is not None:
            analysis.rungs.append(RungRow(name, "python", failure))
            todo[:0] = children
    if not analysis.programs:
        raise whole


def _submodule(module: nn.Module, name: str, call: RecordedCall, above: CaptureError, analysis: Analysis) -> str | None:
    try:
        program = capture(module, call.args, call.kwargs, fqn=name, hooked=())
    except CaptureError as e:
        return e.found
    analysis.rungs.append(RungRow(name, "submodule", above.found))
    add_program(analysis, program)
    return None
