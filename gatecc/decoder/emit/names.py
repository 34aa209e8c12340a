"""names: what the inputs and outputs of a closed step are called, in the words of onnxruntime-genai and optimum.

input_ids, attention_mask, position_ids
past_key_values.0.key, past_key_values.0.value -> present.0.key, present.0.value
past.0.recurrent -> present.0.recurrent     the state of an operator
past.0.conv      -> present.0.conv          the last values before a convolution or a delay
past.0.sum       -> present.0.sum           a cumulative value
past.NAME        -> present.NAME            the values so far of the input NAME
"""

from __future__ import annotations

import re
from collections import Counter

from gatecc.decoder.emit.closed import MASK, Closed, Held

TOKENS, LOGITS = "input_ids", "logits"
_OF_KIND = {"state": "recurrent", "taps": "conv", "scan": "sum"}
_INDEX = re.compile(r"^(.*?)(?:^|\.)(\d+)(?:\.|$)")


def input_names(step: Closed) -> list[str]:
    """The names of the program's inputs, in their order."""
    held = {h.source: past for h, (past, _) in zip(step.held, state_names(step), strict=True)}
    names = {step.tokens: TOKENS, **({} if step.mask is None else {step.mask: MASK}), **held}
    return [names.get(node, node.name) for node in step.program.placeholders]


def output_names(step: Closed) -> list[str]:
    """The names of the program's outputs, in their order."""
    return [LOGITS, *(present for _, present in state_names(step))]


def state_names(step: Closed) -> list[tuple[str, str]]:
    """The names of each state as an input and as an output. What is the second of its kind in a layer gets a number."""
    layers, seen, found = layer_numbers(step), Counter[str](), list[tuple[str, str]]()
    for held, layer in zip(step.held, layers, strict=True):
        what = _what(held)
        key = what if layer is None else f"{layer}.{what}"
        number, seen[key] = seen[key], seen[key] + 1
        key += f"_{number}" if number else ""
        past = f"past_key_values.{key}" if what in ("key", "value") else f"past.{key}"
        found.append((past, f"present.{key}"))
    return found


def _what(held: Held) -> str:
    if held.slot is None:
        return held.given.name if held.given is not None else ""
    return held.slot.role if held.slot.kind == "keys" else _OF_KIND[held.slot.kind]


def layer_numbers(step: Closed) -> list[int | None]:
    """The layer of each state: the first number in the name of its module, if all have one of one list of layers; else
    the layers are counted. None for values per token."""
    found = [None if h.slot is None else _INDEX.match(h.slot.owner) for h in step.held]
    prefixes = {None if m is None else m[1] for h, m in zip(step.held, found, strict=True) if h.slot is not None}
    if len(prefixes) == 1 and None not in prefixes:
        return [None if m is None else int(m[2]) for m in found]
    counted: dict[str, int] = {}
    numbers: list[int | None] = []
    for held, match in zip(step.held, found, strict=True):
        if held.slot is None:
            numbers.append(None)
            continue
        layer = held.slot.owner if match is None else match[0]
        numbers.append(counted.setdefault(layer, len(counted)))
    return numbers
