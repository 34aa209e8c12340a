"""Caches: whether calls with a KV cache give what calls without one do, found by trying; and switching them off."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gatecc.capture.adapters import Setting, switch_caches
from gatecc.capture.shield import callers_device
from gatecc.capture.signature import TOKENS
from gatecc.engine.modes import holding
from gatecc.engine.put_off import on_meta
from gatecc.errors import GateccError
from gatecc.ir.weights import Effect
from gatecc.scope.python_path import PythonPath
from gatecc.scope.state import base_forward, scopes

_CACHES = ("cache", "past_key_values")  # what models call a cache, the newer name first
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}  # relative to the largest output; others: 5 percent
_VALUES = ("position_ids", "token_type_ids")  # values per token: a step has its own alone, of masks all so far
_MASKS = ("attention_mask", "decoder_attention_mask")


def why_no_cache(model: nn.Module, effects: Collection[Effect], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why calls with a KV cache cannot be served, "" if they can or the model has none.

    Where the rewrites can be done in Python, calls are tried: with a cache, and one token that goes on from it, against
    the call without one. Noise on the new parameters lets each of them show. What fails is refused from then on.
    ``effects``: what was done to the model's weights.
    """
    for fqn, module, state in scopes(model):
        if not fqn:
            return "the model runs as one graph, and a graph holds no cache"
        if state.python.refused and _may_take_one(module):
            return state.python.refused
    if on_meta(model):
        return _refused(model, "it cannot be tried without weights")
    try:
        generator = torch.Generator().manual_seed(0)
        noisy = {p: x for effect in effects for p, x in effect.noisy(model, generator).items()}
        with holding(noisy), torch.no_grad(), callers_device():
            reason = _tried(model, args, kwargs)
    except GateccError as e:
        reason = e.found or e.what
    except Exception as e:
        reason = f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"
    return _refused(model, f"a call with one was tried: {reason}") if reason else ""


def _refused(model: nn.Module, reason: str) -> str:
    for _, _, state in scopes(model):
        state.python = PythonPath(refused=reason)
    return reason


def _may_take_one(module: nn.Module) -> bool:
    """Whether calls of a scope may hold a cache; those of a feed-forward layer are graphs with and without one."""
    takes = inspect.signature(base_forward(module)).parameters.values()
    return any(p.name in _CACHES or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in takes)


def caches_off(model: nn.Module) -> list[Setting]:
    """Switch ``use_cache`` off in every configuration of a model; what there was, for ``caches_on``."""
    return switch_caches(model)


def caches_on(settings: Sequence[Setting]) -> None:
    """Give configurations their settings back."""
    for config, value in settings:
        config.use_cache = value


def _tried(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    takes = inspect.signature(model.forward).parameters
    if "use_cache" not in takes or any(p.kind is p.VAR_POSITIONAL for p in takes.values()):
        return _with_configurations(model, args, kwargs)
    given = {**dict(zip(takes, args, strict=False)), **kwargs, "use_cache": False}
    plain = _tensors(model(**given))[0]
    if reason := _difference(plain, _tensors(model(**{**given, "use_cache": True}))[0]):
        return reason
    return _with_a_step(model, given, plain)


def _with_configurations(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """A model around one that has a cache: its calls while the configurations say so, and while they do not."""
    settings = caches_off(model)
    try:
        off = _tensors(model(*args, **kwargs)) if settings else []
    finally:
        caches_on(settings)
    return _difference(off[0], _tensors(model(*args, **kwargs))[0]) if off else ""


def _with_a_step(model: nn.Module, given: dict[str, Any], full: torch.Tensor) -> str:
    """All tokens but the last, and the last from the cache. "" also where the inputs cannot be cut so."""
    name = next((n for n in TOKENS if isinstance(given.get(n), torch.Tensor)), None)
    cache = next((n for n in _CACHES if n in inspect.signature(model.forward).parameters), None)
    ids = given.get(name) if name else None
    if name is None or cache is None or ids is None or ids.dim() != 2 or ids.shape[1] < 2:
        return ""
    of_tokens = (*_VALUES, _MASKS[1] if name == TOKENS[0] else _MASKS[0])
    before, last = dict(given), dict(given)
    for n in (name, *of_tokens):
        x = given.get(n)
        if isinstance(x, torch.Tensor) and x.shape[-1] == ids.shape[1]:
            before[n], last[n] = x[..., :-1], x if n in _MASKS else x[..., -1:]
    for call in (before, last):
        call["use_cache"] = True
        call.pop("labels", None)
    held = _cache_of(model(**before), cache)
    if held is None:
        return ""
    found = _tensors(model(**{**last, cache: held}))[0]
    if found.dim() < 3 or full.dim() != found.dim() or found.shape[1] != 1:
        return ""
    mask = given.get(of_tokens[-1])
    seen = mask[:, -1].bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else slice(None)
    return _difference(full[seen, -1:], found[seen])


def _cache_of(output: Any, name: str) -> Any:
    return output.get(name) if hasattr(output, "get") else getattr(output, name, None)


def _tensors(output: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> str:
    if wanted.shape != found.shape:
        return f"an output of shape {tuple(found.shape)} in the place of {tuple(wanted.shape)}"
    if not wanted.numel():
        return ""
    scale = wanted.abs().max().clamp_min(1.0)
    worst = float(((wanted - found).abs().max() / scale).nan_to_num(nan=float("inf")))
    return "" if worst <= _TOLERANCE.get(wanted.dtype, 5e-2) else f"outputs differ by {worst:.1e}"
