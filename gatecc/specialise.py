"""specialise: from a model whose routers read a condition, such as a task, to the model for one value of it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.signature import split_inputs
from gatecc.errors import ArgumentError
from gatecc.ir.gates.linear_by import LinearBy
from gatecc.ir.gates.scorer import Linear
from gatecc.ir.gates.source import Concat, Cond, Source
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.ir.router import Router, RouterSpec
from gatecc.ir.weights import joined
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.route import Route
from gatecc.passes.route.spec import ExpertsSpec
from gatecc.scope.state import scopes
from gatecc.transform import history, revert, transform

Value = int | Tensor
_TOLERANCE = 1e-5


@dataclass
class _Layer:
    """One routed site: the rewrite, the owner, its modules, and the experts that calibration met."""

    route: Route
    owner: str
    path: str  # of the router
    router: Router
    experts: Experts
    kept: list[int]

    @property
    def stacked(self) -> str:
        """The path of the experts."""
        return joined(self.path.rpartition(".")[0], self.route.label)


@torch.no_grad()
def specialise(
    model: nn.Module, batches: Iterable[Any], fixed: Mapping[str, Value], *, experts: Literal["used", "all"] = "used"
) -> nn.Module:
    """The model for one value of what its routers read: one router for each layer, and the experts that it uses.

    ``fixed``: inputs of the model that routers read as ``cond(NAME)``, and their values: a whole number (the router of
    that task stays, of `linear_by`), or an embedding (C,) (its product with the rows becomes the bias of a linear
    router). ``batches``: example inputs of that task. ``experts="used"`` keeps those that some token of them chose,
    which is the task's own set of experts: exact on what is like the batches; a token that would go elsewhere takes the
    best of those that are left. ``"all"`` keeps every expert and is exact on any input. Either way the routers of the
    other tasks are gone (M³ViT: inference with one task, 2022).

    The result is a model of its own, trained, saved, loaded and exported alone. It is called as before, but no router
    reads the fixed inputs any more: what the model's own forward does not need may be left out. It is compared with the
    model on the batches.

    Raises ArgumentError: no router reads these inputs, in a form that can be fixed; experts that cannot be left out
    one by one, or that count in the weights of others (renorm=False); no batch.
    """
    calls = [_fixed(model, split_inputs(batch), fixed) for batch in batches]
    layers = list(_layers(model, fixed))
    if not calls or not layers:
        found = "no batch" if layers else f"no router that reads {', '.join(fixed)}"
        raise ArgumentError("there is nothing to specialise on", found=found, expected="cond(NAME) in routers, batches")
    expected = _calibrate(model, layers, calls)
    for layer in layers:
        every = list(range(layer.router.experts))
        layer.kept = every if experts == "all" else [e for e in every if e in set(layer.kept)]
    rewrites = tuple(r for step in history(model) for old in step.recipe.rewrites for r in _rewritten(old, layers))
    names = ", ".join(f"{n}={v}" if isinstance(v, int) else n for n, v in fixed.items())
    citation = history(model)[-1].recipe.citation
    made = transform(revert(model), Recipe(f"specialised to {names}", citation, rewrites), calls[0], verify=False)
    made.load_state_dict(_state(model, made, layers, fixed))
    made.train(model.training)
    _compare(made, calls, expected)
    return made


def _fixed(model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], fixed: Mapping[str, Value]) -> Any:
    """A call with the fixed inputs in it, by name."""
    args, kwargs = call
    parameters = list(inspect.signature(model.forward).parameters)
    rows = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).size(0)
    named = dict(kwargs)
    positional = list(args)
    for name, value in fixed.items():
        if name not in parameters:
            raise ArgumentError("the model has no such input", found=name, expected=", ".join(parameters))
        full = torch.full((rows,), value) if isinstance(value, int) else value.expand(rows, -1)
        if (at := parameters.index(name)) < len(positional):
            positional[at] = full
        else:
            named[name] = full
    return tuple(positional), named


def _layers(model: nn.Module, fixed: Mapping[str, Value]) -> Iterator[_Layer]:
    """The routed sites whose routers read what is fixed."""
    for fqn, _, state in scopes(model):
        for application in state.applied:
            route = application.rewrite
            if not isinstance(route, Route) or not any(ref.cond in fixed for ref in route.router.sources):
                continue
            for owner, _ in application.sites:
                yield _layer(model, route, joined(fqn, owner))


def _layer(model: nn.Module, route: Route, owner: str) -> _Layer:
    found = [
        name
        for name, m in model.get_submodule(owner).named_children()
        if isinstance(m, Router) and m.router == route.router
    ]
    experts = model.get_submodule(owner)._modules.get(route.label)
    if len(found) != 1 or not isinstance(experts, Experts):
        raise ArgumentError(
            "this layer cannot be specialised",
            where=owner or type(model).__name__,
            found=f"{len(found)} routers, {type(experts).__name__}",
            expected="one router with one stack of experts, as copies(...) makes them",
        )
    path = joined(owner, found[0])
    return _Layer(route, owner, path, cast("Router", model.get_submodule(path)), experts, [])


def _calibrate(model: nn.Module, layers: Sequence[_Layer], calls: Sequence[Any]) -> list[Any]:
    """Run the model; the outputs, and into each layer the experts that were met."""
    handles = [layer.router.register_forward_hook(_watch(layer)) for layer in layers]
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        return [_tensors(model(*args, **kwargs)) for args, kwargs in calls]
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training:
            module.training = was


def _watch(layer: _Layer) -> Any:
    def hook(_module: nn.Module, _given: Any, out: Any) -> None:
        layer.kept += out[1].unique().tolist()

    return hook


def _rewritten(old: Rewrite, layers: Sequence[_Layer]) -> Iterator[Rewrite]:
    """A rewrite as it is, or for each layer one with a router and experts of its own."""
    mine = [layer for layer in layers if layer.route == old]
    if not mine:
        yield old
        return
    for layer in mine:
        site = replace(layer.route.site, where=(layer.owner,), besides=None)
        spec = _with(layer.route.experts, len(layer.kept))
        yield replace(layer.route, site=site, router=_router(layer.route.router, layer), experts=spec)


def _with(spec: ExpertsSpec, count: int) -> ExpertsSpec:
    if count == spec.count:
        return spec
    if not hasattr(spec, "n"):
        raise ArgumentError("experts of this kind cannot be left out one by one", found=str(spec), do='experts="all"')
    return replace(cast("Copies", spec), n=count)


def _router(spec: RouterSpec, layer: _Layer) -> RouterSpec:
    """The router without the condition."""
    rest = tuple(part for part in spec.source.parts if not isinstance(part, Cond))
    fits = isinstance(spec.scorer, LinearBy | Linear)
    conditions = len(spec.source.parts) - len(rest)
    if not fits or not rest or conditions != 1 or not isinstance(spec.source.parts[-1], Cond):
        raise ArgumentError(
            "the condition of this router cannot be fixed",
            where=layer.path,
            found=str(spec),
            expected="linear_by or linear scores of values, the condition as the last of them",
        )
    source: Source = rest[0] if len(rest) == 1 else Concat(rest)
    scorer = Linear(bias=isinstance(spec.scorer, Linear))
    return RouterSpec(source, scorer, spec.choice, spec.init, spec.balance, spec.mask)


def _state(
    model: nn.Module, made: nn.Module, layers: Sequence[_Layer], fixed: Mapping[str, Value]
) -> dict[str, Tensor]:
    """The state of the specialised model, from that of the whole one."""
    old = model.state_dict()
    state = {name: tensor for name, tensor in old.items() if name in made.state_dict()}
    for layer in layers:
        for name, tensor in layer.experts.state_dict().items():
            state[f"{layer.stacked}.{name}"] = tensor if name == "bias" else tensor[layer.kept]
        for name, tensor in _router_state(layer, fixed).items():
            state[f"{layer.path}.{name}"] = tensor
    return state


def _router_state(layer: _Layer, fixed: Mapping[str, Value]) -> dict[str, Tensor]:
    router, count = layer.router, layer.router.experts
    state = dict(router.state_dict())
    weight = state.pop("weight")
    scores = router.router.choice.scores(count)
    rows = [e + group * count for group in range(scores // count) for e in layer.kept]
    value = fixed[str(router.router.sources[-1].cond)]
    if isinstance(router.router.scorer, LinearBy):
        made = {"weight": weight[int(value)][rows]}
    else:
        text = torch.as_tensor(value, dtype=weight.dtype, device=weight.device).reshape(-1)
        width = weight.size(1) - text.numel()
        bias = weight[:, width:] @ text + state.pop("bias", weight.new_zeros(()))
        made = {"weight": weight[rows, :width], "bias": bias[rows]}
    return made | {n: t[layer.kept] if t.dim() and t.size(0) == count else t for n, t in state.items()}


def _compare(made: nn.Module, calls: Sequence[Any], expected: Sequence[list[Tensor]]) -> None:
    training = made.training
    outputs = [_tensors(made.eval()(*args, **kwargs)) for args, kwargs in calls]
    made.train(training)
    for got, wanted in zip(outputs, expected, strict=True):
        for a, b in zip(got, wanted, strict=True):
            error = float((a - b).abs().max() / b.abs().max().clamp_min(1.0)) if b.numel() else 0.0
            if not error <= _TOLERANCE:
                raise ArgumentError(
                    "the model without the other experts computes something else",
                    found=f"outputs differ by {error:.1e}",
                    expected="weights that depend on the chosen experts alone: renorm=True",
                    do='experts="all"',
                )


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
