"""genai: decode.onnx as onnxruntime-genai runs it, with what it takes for granted, cannot take, and gets wrong.

Its loop feeds tokens, a mask, keys and values, and two kinds of states of fixed size, "conv" and "recurrent"; a layer
that has one of them must have the other, and within a kind all layers have one shape. States that nothing needs are
added for its sake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gatecc.export.carried import Carried

CONFIG = "genai_config.json"
DUMMY = "dummy"  # the kind of a state that nothing needs
_KINDS = {"keys": "key", "state": "recurrent", "taps": "conv"}
_FIXED = ("conv", "recurrent")
_DTYPES = ("float32", "float16")
_MASKS = ("int64", "int32")
_AXES = {"keys": (4,), "taps": (2, 3)}  # how many a state of this kind may have there
_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
_NO_END = 0  # the first token, which is a special one in most vocabularies
_NO_PAD = -1  # no token is that one: without an entry, tokens 0 at the end of a prompt are taken for padding


@dataclass(frozen=True)
class Genai:
    """decode.onnx in onnxruntime-genai. ``refused``: why there is no genai_config.json, "" if there is one.

    ``padding``: where prompts of several lengths may be padded there: "right", or "none".
    ``limits``: what it cannot do, or does wrong without a word.
    """

    refused: str
    padding: str
    limits: tuple[str, ...]


def unfit(states: Sequence[Carried], values: Sequence[str], logits: Sequence[int | str], mask: str = "int64") -> str:
    """Why onnxruntime-genai cannot run a graph with these states, inputs with a value per token, logits, and dtype of
    the mask; "" if it can."""
    others = [name for name in values if name != "position_ids"]
    if others:
        return f"it has nothing to give to the input {others[0]}"
    if len(logits) != 3 or not isinstance(logits[2], int):
        return f"it wants logits (batch, sequence, vocabulary), not {list(logits)}"
    if mask not in _MASKS:
        return f"its attention_mask is int64 or int32, not {mask}"
    for state in states:
        if reason := _unfit(state):
            return f"{state.input} {state.shape} {state.dtype}: {reason}"
    for kind in ("state", "taps"):
        shapes = {tuple(s.shape) for s in states if s.kind == kind}
        if len(shapes) > 1:
            return f"it wants one shape of {_KINDS[kind]} in all layers, not {sorted(map(list, shapes), key=str)}"
    return ""


def _unfit(state: Carried) -> str:
    last = state.input.rpartition(".")[2]
    if state.kind not in _KINDS or state.layer is None or last not in ("key", "value", *_FIXED):
        return "it knows keys, values, and one recurrent and one conv state per layer"
    if state.dtype not in _DTYPES:
        return "states are float32 or float16 there"
    if state.fill:
        return f"states begin with zeros there, not with {state.fill:g}"
    if state.kind == "keys" and state.grows != 2:
        return "keys grow along their third axis there"
    sizes = [size for axis, size in enumerate(state.shape) if axis not in (0, state.grows)]
    if state.shape[0] != "batch" or not all(isinstance(size, int) for size in sizes):
        return "the first axis must be the samples, and what stays a number"
    if state.kind in _AXES and len(state.shape) not in _AXES[state.kind]:
        return f"this kind of state has {_AXES[state.kind][-1]} axes there"
    return ""


def dummies(states: Sequence[Carried]) -> list[Carried]:
    """The states that are missing so that each layer with one of both fixed kinds has the other."""
    held = {(s.layer, s.input.rpartition(".")[2]): s for s in states}
    layers = sorted({layer for layer, kind in held if layer is not None and kind in _FIXED})
    found: list[Carried] = []
    for layer, kind in ((layer, kind) for layer in layers for kind in _FIXED if (layer, kind) not in held):
        real = next((s for (_, other), s in held.items() if other == kind), None)
        shape: list[int | str] = ["batch", 1] if real is None else list(real.shape)
        dtype = next(s.dtype for (of, other), s in held.items() if of == layer and other in _FIXED)
        past, present = f"past.{layer}.{kind}", f"present.{layer}.{kind}"
        found.append(Carried(past, present, DUMMY, layer, shape, dtype, None, 0.0, shared=False))
    return found


def write_config(
    folder: Path,
    graph: str,
    model: nn.Module,
    states: Sequence[Carried],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
    context: int,
) -> list[str]:
    """Write genai_config.json for a graph that fits; what there is to say of it. ``context``: the most tokens."""
    keys = [s for s in states if s.kind == "keys"]
    vocabulary = int(outputs["logits"][2])
    tokens, notes = _tokens(model, vocabulary)
    fixed = next((s for s in states if s.kind in ("state", "taps")), None)
    sizes = {
        "head_size": keys[0].shape[3] if keys else fixed.shape[-1] if fixed is not None else 1,
        "hidden_size": _setting(model, "hidden_size"),
        "num_attention_heads": _setting(model, "num_attention_heads") or (keys[0].shape[1] if keys else None),
        "num_key_value_heads": keys[0].shape[1] if keys else None,
        "num_hidden_layers": 1 + max((s.layer or 0 for s in states), default=0),
    }
    named = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        **{name: size for name, size in sizes.items() if size is not None},
        "inputs": {**named, **_templates("past_key_values", "past", keys, states)},
        "outputs": {"logits": "logits", **_templates("present", "present", keys, states)},
    }
    search = {name: x for name in _SEARCH if (x := getattr(_generation(model), name, None)) is not None}
    shares = _shares(states)
    config = {
        "model": {"type": "decoder", "vocab_size": vocabulary, "context_length": context, **tokens, "decoder": decoder},
        "search": {"max_length": context, "past_present_share_buffer": shares, **search},
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return notes


def no_buffers(folder: Path, states: Sequence[Carried]) -> None:
    """Take the promise of shared buffers out of genai_config.json where the states of a graph have none any more."""
    config = json.loads((folder / CONFIG).read_text())
    if config["search"]["past_present_share_buffer"] and not _shares(states):
        config["search"]["past_present_share_buffer"] = False
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _shares(states: Sequence[Carried]) -> bool:
    keys = [s for s in states if s.kind == "keys"]
    return bool(keys) and all(s.shared for s in keys)


def _templates(keys: str, fixed: str, kept: Sequence[Carried], states: Sequence[Carried]) -> dict[str, str]:
    """The names of states with %d for the layer, under the words of the config: past_..., present_..."""
    when = fixed
    found = {f"{when}_{what}_names": f"{keys}.%d.{what}" for what in ("key", "value") if kept}
    if len(kept) < len(states):
        found |= {f"{when}_{what}_names": f"{fixed}.%d.{what}" for what in _FIXED}
    return found


def _tokens(model: nn.Module, vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """The tokens that mean something, and what there is to say of them."""
    found: dict[str, Any] = {}
    notes: list[str] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = _setting(model, name)
        listed = given if isinstance(given, list | tuple) else [] if given is None else [given]
        valid = [int(token) for token in listed if 0 <= token < vocabulary]
        if len(valid) < len(listed):
            notes.append(f"{name} {given} of the model's config is no token of its {vocabulary}, and is left out")
        if valid:
            found[name] = valid if name == "eos_token_id" and len(valid) > 1 else valid[0]
    if "pad_token_id" in found:
        notes.append(f"tokens {found['pad_token_id']} (pad_token_id) at the end of a prompt are taken for padding")
    found.setdefault("pad_token_id", _NO_PAD)
    if "eos_token_id" not in found:  # which there must be; if it is left out, it is the padding
        found["eos_token_id"] = _NO_END
        notes.append(f"the model's config names no end of a text (eos_token_id), so token {_NO_END} ends it")
    return found, notes


def _generation(model: nn.Module) -> Any:
    return getattr(model, "generation_config", None)


def _setting(model: nn.Module, name: str) -> Any:
    """What the configs of a model say; None if they do not."""
    config: Any = getattr(model, "config", None)
    for part in (_generation(model), config, getattr(config, "text_config", None)):
        found = getattr(part, name, None)
        if found is not None:
            return found
    return None


def limits(states: Sequence[Carried], padding: str, context: int, kept: str = "") -> list[str]:
    """What does not work in onnxruntime-genai with such a graph. ``kept``: why it reads a mask of the padding."""
    found: list[str] = [f"no more than {context} tokens, prompt and answer together"]
    if padding != "right":
        found.append(
            "prompts of one batch must have one length: padding gives wrong tokens there" + f" ({kept})" * bool(kept)
        )
    if any(s.kind in ("state", "taps") for s in states):
        found += [
            "beam search gives wrong tokens: states do not follow the beams (num_beams=1)",
            "append_tokens after generate_next_token gives wrong tokens: a new Generator for each turn",
            "rewind_to(n) with n above 0 is refused",
        ]
    return found
