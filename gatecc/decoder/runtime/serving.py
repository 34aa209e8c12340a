"""Serving: ``generate`` of a transformers model whose rewrites keep no KV cache runs through the derived decoder.

The model's class becomes a subclass of the same name, as that of a scope does. transformers' own loop stays: its
logits processors, criteria, streamers, sampling and beams. What changes is the cache that it is given: a decoder's
state, with which a call of the model is a step of the decoder. Where no decoder can be derived, and for what a decoder
does not show (hidden states, attentions, hooks), generate runs without a cache, as with ``use_cache=False``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from gatecc.decoder.derive import decoder
from gatecc.decoder.runtime.decoder import Decoder
from gatecc.decoder.runtime.served import NAMES, ServedState, counts
from gatecc.errors import CallNotCapturedError
from gatecc.scope.scope import scoped_class
from gatecc.scope.state import base_class, scope_of

LOG = logging.getLogger("gatecc")
KEPT = "_gatecc_decoders"
_PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids")
_EXAMPLE = (2, 16)  # samples and tokens that a decoder is derived from
_RECORDERS = (
    "transformers.utils.output_capturing"  # whose hooks act only where outputs are asked for, which are plain calls
)


class Decoders:
    """The decoders of one model by the inputs that they take, or why there is none. Not copied or saved."""

    def __init__(self) -> None:
        self.state: Any = None
        self.of: dict[tuple[str, ...], Decoder | str] = {}
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Decoders:
        return Decoders()

    def __reduce__(self) -> Any:
        return (Decoders, ())

    def get(self, model: nn.Module, names: tuple[str, ...]) -> Decoder | str:
        """The decoder for these inputs, derived if it is not there or the model has changed; or why there is none."""
        with self.lock:
            state = _state_of(model)
            if state != self.state:
                self.state, self.of = state, {}
            if names not in self.of:
                self.of[names] = _derived(model, names)
                if isinstance(self.of[names], str):
                    LOG.warning("generate of %s runs without a cache: %s", type(model).__name__, self.of[names])
            return self.of[names]


def serve(model: nn.Module) -> list[nn.Module]:
    """Serve every generating module that holds a scope. Returns those that were not served before.

    A generating module is one of transformers: it has the loop of GenerationMixin.
    """
    found = [
        m
        for m in model.modules()
        if hasattr(m, "_prepare_cache_for_generation") and any(scope_of(child) for child in m.modules())
    ]
    new = [m for m in found if not is_served(m)]
    for module in new:
        module.__class__ = _served_class(type(module))
        vars(module)[KEPT] = Decoders()
    return new


def is_served(module: nn.Module) -> bool:
    """Whether generate of a module goes through a decoder."""
    return hasattr(type(module), "gatecc_served")


def stop_serving(module: nn.Module) -> None:
    """Undo ``serve`` on one module."""
    if is_served(module):
        module.__class__ = cast("Any", type(module)).gatecc_served
        vars(module).pop(KEPT, None)


@functools.cache
def _served_class(below: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``below`` (a model's class, or that of a scope on it) whose generate keeps a decoder's state."""
    base = cast("Any", below)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in NAMES:
            if isinstance(kwargs.get(name), ServedState):
                return kwargs[name].call(self, args, {n: x for n, x in kwargs.items() if n != name})
        return base.forward(self, *args, **kwargs)

    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, *rest: Any) -> Any:
        # Positions without a mask may be those of packed texts; where they count from 0 the model takes them by itself.
        if model_kwargs.get("attention_mask") is None and counts(model_kwargs.get("position_ids")):
            model_kwargs["position_ids"] = None
        own = any(model_kwargs.get(name) is not None for name in NAMES)
        if own or generation_config.use_cache is False:  # the user's choice
            return base._prepare_cache_for_generation(self, generation_config, model_kwargs, mode, *rest)
        _check(self, model_kwargs, mode)
        names = tuple(n for n in _PER_TOKEN if isinstance(model_kwargs.get(n), torch.Tensor))
        made = _why_plain(self, generation_config, model_kwargs) or vars(self)[KEPT].get(self, names)
        if isinstance(made, str):
            generation_config.use_cache, generation_config.prefill_chunk_size = False, None
        else:
            model_kwargs[NAMES[0] if _takes(base, NAMES[0]) else NAMES[1]] = ServedState(made)
        return None

    def reduce(self: Any, protocol: Any = None) -> Any:
        own = base_class(self)
        return (_new, (own, issubclass(type(self), scoped_class(own))), self.__getstate__())

    cast("Any", forward).__signature__ = inspect.signature(base.forward)
    names = {"forward": forward, "_prepare_cache_for_generation": prepare, "__reduce_ex__": reduce}
    about = {"__module__": below.__module__, "__qualname__": below.__qualname__, "__doc__": below.__doc__}
    return type(below.__name__, (below,), {**names, **about, "gatecc_base": _base(below), "gatecc_served": below})


def _base(below: type[nn.Module]) -> type[nn.Module]:
    return cast("type[nn.Module]", getattr(below, "gatecc_base", below))


def _new(base: type[nn.Module], scoped: bool) -> nn.Module:
    cls = _served_class(scoped_class(base) if scoped else base)
    return cls.__new__(cls)


def _takes(base: Any, name: str) -> bool:
    """Whether a forward has a parameter of this name: transformers has renamed the cache."""
    return name in inspect.signature(base.forward).parameters


def _check(model: nn.Module, given: dict[str, Any], mode: Any) -> None:
    """Raise CallNotCapturedError for what neither a decoder nor a run without a cache can do."""
    assisted = "assisted" in str(getattr(mode, "value", mode))
    embeds = given.get("inputs_embeds") is not None and not cast("Any", model).config.is_encoder_decoder
    if assisted or embeds:
        raise CallNotCapturedError(
            "generate of this rewritten model cannot start from embeddings"
            if embeds
            else "assisted generation takes tokens back, and the state of a rewritten model cannot",
            where=type(model).__name__,
            found="inputs_embeds" if embeds else "an assistant model, or prompt_lookup_num_tokens",
            do="pass input_ids" if embeds else "generate without an assistant",
        )


def _why_plain(model: nn.Module, config: Any, given: dict[str, Any]) -> str:
    """Why the model itself is to run at each token; "" if a decoder may."""
    others = [n for n, x in given.items() if n not in _PER_TOKEN and _is_input(x)]
    device = next(model.parameters()).device
    reasons = {
        "it is an encoder-decoder": cast("Any", model).config.is_encoder_decoder,
        "it reads " + ", ".join(others): bool(others),
        "it is in training mode": any(m.training for m in model.modules()),
        "hidden states or attentions are asked for": config.output_hidden_states or config.output_attentions,
        "autocast is on": torch.is_autocast_enabled(device.type),
        "its modules have hooks": any(map(_acts, _hooks(model))),
        "it is on several devices": any(p.device != device for p in model.parameters()),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _is_input(x: Any) -> bool:
    return x is not None and not isinstance(x, bool | int | float | str)


def _hooks(model: nn.Module) -> Iterator[Any]:
    for m in list(model.modules())[1:]:  # the hooks of the model itself run around a step, too
        for hooks in (m._forward_hooks, m._forward_pre_hooks):
            yield from hooks.values()


def _acts(hook: Any) -> bool:
    return getattr(hook, "__module__", None) != _RECORDERS


def _state_of(model: nn.Module) -> Any:
    """What a decoder was derived from: it is derived anew when this changes."""
    config = cast("Any", model).config
    tensors = (*model.named_parameters(), *model.named_buffers())
    return (
        tuple((n, id(t), t.dtype, t.device, t.shape) for n, t in tensors),
        tuple((id(m), type(m)) for m in model.modules()),
        config.to_json_string() if hasattr(config, "to_json_string") else "",
        getattr(config, "_attn_implementation", None),
    )


def _derived(model: nn.Module, names: tuple[str, ...]) -> Decoder | str:
    """The decoder of a model that is called with token ids and ``names``, or the reason why it has none."""
    try:
        table = cast("Any", model).get_input_embeddings()
        weight = table.weight
        size = min(_EXAMPLE[0] * _EXAMPLE[1], weight.shape[0])
        ids = (torch.arange(_EXAMPLE[0] * _EXAMPLE[1], device=weight.device) % size).view(_EXAMPLE)
        values = {
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(_EXAMPLE[1], device=weight.device).expand(_EXAMPLE),
            "token_type_ids": torch.zeros_like(ids),
        }
        return decoder(model, {"input_ids": ids, **{n: values[n] for n in names}})
    except Exception as e:
        return str(e).strip().splitlines()[0]
