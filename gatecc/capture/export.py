"""capture: one module, called once, becomes a Program (non-strict torch.export, grad mode as it is, sizes dynamic)."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim, ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.graph import CodeGen

from gatecc.capture import signature
from gatecc.capture.adapters import adapted
from gatecc.capture.casts import casts_left_out
from gatecc.capture.forms import TraceableForms, called_at_failure, nothing_drawn_by_python
from gatecc.capture.frames import no_source_lines
from gatecc.capture.functions import functions_marked
from gatecc.capture.guards import size_guards
from gatecc.capture.hooks import marked
from gatecc.capture.kept import attributes_kept
from gatecc.capture.neutral import neutral_weights
from gatecc.capture.origins import OriginWriter, model_line, module_stack, raised_at
from gatecc.capture.shield import callers_device
from gatecc.capture.subclasses import plain_weights
from gatecc.errors import CaptureError, GateccError
from gatecc.ir.boundary import Boundary
from gatecc.ir.functions import FunctionCall, settle_functions
from gatecc.ir.hooks import hooks_kept
from gatecc.ir.loops import free_lengths
from gatecc.ir.program import Program, attribute

_SLICE = re.compile(r"slice\((None|-?\d+), (None|-?\d+), (None|-?\d+)\)")
_CALL_SUFFIX = re.compile(r"@\d+")


class _Flat(nn.Module):
    """The module as a function of its tensor leaves alone: constants and None are closed over, nesting is undone.

    This spares gatecc the nesting rules of dynamic_shapes for *args and **kwargs.
    """

    def __init__(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.m = module
        self.training = module.training
        self._call = (call,)  # in a tuple, lest a module be registered twice
        self._template = (args, kwargs)

    def forward(self, *leaves: torch.Tensor) -> Any:
        args, kwargs = signature.rebuild(self._template, iter(leaves))
        return self._call[0](*args, **kwargs)


def capture(
    module: nn.Module,
    args: tuple[Any, ...] | Mapping[str, Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    fqn: str = "",
    forward: Callable[..., Any] | None = None,
    dynamic: Literal["auto", "none"] | Sequence[Collection[int]] = "auto",
    hooked: Collection[str] | None = None,
    functions: bool = False,
) -> Program:
    """Capture ``module(*args, **kwargs)`` as a Program.

    Without ``kwargs``, ``args`` are example inputs in any form: a tuple, a dict of keyword arguments or (tuple, dict).
    ``fqn`` is the module's place in the model and prefixes every owner. ``forward`` stands in for ``module.__call__``
    (an unbound forward with the module bound to it). With ``dynamic="auto"`` every dimension of size 2 or more is
    dynamic unless the model specialises it; the guards say which. Height and width of an image that enters the whole
    model are not: see dynamic_axes. Otherwise ``dynamic`` are the axes of each input that may vary. Train or eval, and
    the grad mode, are as they are now. Hooks on submodules are traced as if they were the model's own code; with
    ``hooked`` none of them is called, and the calls of these submodules are marked (gatecc.ir.boundary). With
    ``functions`` so are calls of custom autograd functions: of a graph that is to be trained.

    Raises CaptureError with torch's reason; the module is left as it was.
    """
    args, kwargs = signature.split_inputs(args if kwargs is None else (args, kwargs))
    try:
        _, leaves = signature.flatten(args, kwargs)
    except signature.OpaqueArgumentError as e:
        raise CaptureError("the call cannot become a graph", where=fqn, found=str(e)) from e
    leaves = _apart(leaves)
    marks = _unmarked(module) if hooked is None else marked(module, hooked)
    plain = plain_weights(module), neutral_weights(module), attributes_kept(module), adapted(module)
    with ExitStack() as stack, free_lengths(), quiet(), _fast():
        for context in plain:
            stack.enter_context(context)
        boundaries = stack.enter_context(marks)
        called: list[FunctionCall] = []
        if functions:
            called = stack.enter_context(functions_marked())
            stack.enter_context(nothing_drawn_by_python(module))
        stack.enter_context(TraceableForms(trained=functions))
        stack.enter_context(casts_left_out(module))
        flat = _Flat(module, _from_start(forward or module, boundaries, called), args, kwargs)
        exported = _export(flat, leaves, fqn, dynamic)
    program = _program(exported, module, leaves, fqn, _paths(module, args, kwargs))
    program.hooked, program.boundaries = frozenset(hooked or ()), boundaries
    program.functions = settle_functions(program.graph_module, called)
    return program


@contextmanager
def _unmarked(module: nn.Module) -> Generator[list[Boundary]]:
    with hooks_kept(module):
        yield []


def _from_start(
    call: Callable[..., Any], boundaries: list[Boundary], functions: list[FunctionCall]
) -> Callable[..., Any]:
    """The call, of which torch.export may make several attempts: what was marked is that of the last one."""

    def attempt(*args: Any, **kwargs: Any) -> Any:
        boundaries.clear()
        functions.clear()
        return call(*args, **kwargs)

    return attempt


def _apart(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """The leaves with each repeated tensor as an object of its own.

    export gives one tensor that is passed twice (query and key, say) one set of sizes, and guards nothing between them.
    """
    seen: set[int] = set()
    apart: list[torch.Tensor] = []
    for x in leaves:
        apart.append(x.detach().requires_grad_(x.requires_grad) if id(x) in seen else x)
        seen.add(id(x))
    return apart


def _export(
    flat: _Flat, leaves: list[torch.Tensor], fqn: str, dynamic: Literal["auto", "none"] | Sequence[Collection[int]]
) -> ExportedProgram:
    if isinstance(dynamic, str):
        free = dynamic_axes(flat.m, whole=not fqn)
        dynamic = [free(x) if dynamic == "auto" else () for x in leaves]
    shapes = [dict.fromkeys(sorted(axes), Dim.AUTO) for axes in dynamic]
    try:
        with callers_device():
            return torch.export.export(flat, tuple(leaves), dynamic_shapes=(tuple(shapes),), strict=False)
    except GateccError:  # of a check that runs inside
        raise
    except Exception as e:
        raise CaptureError(
            "torch.export could not capture this module",
            where=fqn or type(flat.m).__name__,
            found=_packed(flat.m) or _reason(e),
            do="select sites in submodules that do not hold this code, or write it with torch.where / torch.cond",
        ) from e


def _packed(module: nn.Module) -> str:
    """Which submodule holds objects of TorchScript in the place of its weights, as torch.ao.quantization makes them."""
    for name, m in module.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(m).values()):
            where = name.removesuffix("._packed_params") or type(m).__name__
            return (
                f"{where} holds its weights packed, which torch.export cannot read; "
                "quantize_ of torchao keeps them as tensors"
            )
    return ""


def _image_channels(module: nn.Module) -> frozenset[tuple[int, int]]:
    """The rank and the channels of images that some convolution of the module reads."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    return frozenset((len(m.kernel_size) + 2, m.in_channels) for m in convs)


def dynamic_axes(module: nn.Module, *, whole: bool = True) -> Callable[[torch.Tensor], list[int]]:
    """Which axes of the inputs of a module may vary. An image that enters the whole model keeps its height and width.

    With symbolic ones, windowed models (Swin) take minutes to capture instead of seconds; a call with another size of
    image makes another capture.
    """
    images = _image_channels(module) if whole else frozenset[tuple[int, int]]()

    def axes(x: torch.Tensor) -> list[int]:
        image = x.dim() >= 4 and x.is_floating_point() and (x.dim(), x.shape[1]) in images
        return [i for i, size in enumerate(x.shape) if size > 1 and not (image and i >= 2)]

    return axes


def _reason(error: BaseException) -> str:
    """The first telling line of torch's message; the user's source line, that it names or that it came through; and
    what was called there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}".replace("self.m.", "self.")
    place = [part for part in (model_line(str(error)) or raised_at(error), called_at_failure(error)) if part]
    return f"{text[:300]} ({': '.join(place)})" if place else text[:300]


def _paths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[Any, ...]]:
    try:
        parameters = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        parameters = []
    return signature.leaf_paths(args, kwargs, parameters)


def _program(
    exported: ExportedProgram, module: nn.Module, leaves: list[torch.Tensor], fqn: str, paths: list[tuple[Any, ...]]
) -> Program:
    graph_module = exported.module(check_guards=False)
    assert isinstance(graph_module, fx.GraphModule)
    graph = graph_module.graph
    graph.set_codegen(CodeGen())
    graph.owning_module = None  # parameters live on the module: fx would look for them on the graph module
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    guards = size_guards(exported, placeholders)
    constants: dict[str, torch.Tensor] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            _retarget(node, graph_module, module, constants)
    for node, path in zip(placeholders, paths, strict=True):
        node._rename(re.sub(r"\W", "_", "_".join(str(p) for p in path)))
        node.target = node.name
    for node in graph.nodes:  # "m" is the wrapper's name for the module, which nobody knows
        if node.op == "get_attr" and node.name.startswith("m_") and _live(module, str(node.target)) is not None:
            node._rename(re.sub(r"\W", "_", str(node.target)))
    _record_origins(graph_module, fqn, module)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    under = signature.autocast(leaves)
    return Program(module, graph_module, fqn, list(leaves), out_spec, paths, guards, constants, autocast=under)


def _retarget(
    node: fx.Node, graph_module: fx.GraphModule, module: nn.Module, constants: dict[str, torch.Tensor]
) -> None:
    """Point a get_attr at the live module; what the module does not hold is a constant of the program."""
    target = str(node.target)
    value = attribute(graph_module, target)
    if not isinstance(value, torch.Tensor):
        return  # the body of a higher-order operator stays in the graph module
    relative = target.removeprefix("m.")
    if target.startswith("m.") and _live(module, relative) is not None:
        node.target = relative
        return
    constants[target] = value


def _live(module: nn.Module, path: str) -> torch.Tensor | None:
    try:
        value = attribute(module, path)
    except AttributeError:
        return None
    return value if isinstance(value, torch.Tensor) else None


def _in_order(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a graph, those of the bodies of higher-order operators (regions without gradients) before the call
    of the operator."""
    for node in graph_module.graph.nodes:
        for source in node.all_input_nodes if isinstance(node.target, HigherOrderOperator) else ():
            body = getattr(graph_module, str(source.target), None) if source.op == "get_attr" else None
            if isinstance(body, fx.GraphModule):
                yield from _in_order(body)
        yield node


def _record_origins(graph_module: fx.GraphModule, fqn: str, module: nn.Module) -> None:
    """Write owner, call and source line of every node into its meta, from what export recorded.

    A module that is registered under several names goes by its first one. Export leaves the prefix off these names.
    """
    first = {id(child): name for name, child in module.named_modules()}
    names = {name: first[id(child)] for name, child in module.named_modules(remove_duplicate=False)}
    origins = OriginWriter()
    for node in _in_order(graph_module):
        stack = [str(path) for path, _ in module_stack(node).values()]
        relative = _CALL_SUFFIX.sub("", stack[-1]) if stack else ""
        relative = relative[2:] if relative == "m" or relative.startswith("m.") else relative
        if "slice(" in relative:
            above = [names[n] for path in stack[:-1] if (n := path.removeprefix("m").lstrip(".")) in names]
            found = (_sliced(module.get_submodule(name), relative) for name in ("", *reversed(above)))
            relative = next((first[id(one)] for one in found if one is not None), relative)
        origins.write(node, ".".join(p for p in (fqn, names.get(relative, "")) if p))


def _sliced(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path that goes through slices of lists: ``layers.slice(1, None, None).0``.

    Export starts such paths somewhere between the root and the module that runs the layers.
    """
    held: nn.Module | list[Any] | None = module
    for part in path.split("."):
        found = _SLICE.fullmatch(part)
        if found is not None and held is not None:
            bounds = [None if bound == "None" else int(bound) for bound in found.groups()]
            held = (held if isinstance(held, list) else list(held._modules.values()))[slice(*bounds)]
        elif isinstance(held, list):
            held = held[int(part)]
        else:
            held = held._modules.get(part) if held is not None else None
    return held if isinstance(held, nn.Module) else None


@contextmanager
def _fast() -> Generator[None]:
    """Three things that torch does for other uses of export.

    The cache of fake tensors serves graphs that repeat: here its bookkeeping is a fifth of the time of a capture. And
    export's passes print their graph as Python after each step, which a lazy graph module leaves until someone calls
    it: a tenth. The third is in frames.py.
    """
    from torch._dynamo import config as dynamo  # half of the time of ``import gatecc``, if it is imported there

    with dynamo.patch(fake_tensor_cache_enabled=False), _use_lazy_graph_module(True), no_source_lines():
        yield


@contextmanager
def quiet() -> Generator[None]:
    """torch.export prints notices about specialised dimensions; gatecc says what matters in its own report."""
    from torch.export import _trace as trace  # imports Dynamo, too

    names = ("torch._export", "torch.export", "torch.fx", "torch._dynamo", "torch._subclasses", "torch.utils._pytree")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    trace.__dict__["print"] = lambda *_, **__: None  # it prints the graph of what it could not export
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)  # what torch logs as an error it also raises, and CaptureError says it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        trace.__dict__.pop("print", None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
