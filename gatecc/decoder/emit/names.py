"""names: what the inputs and outputs of a closed step are called, in the words of onnxruntime-genai and optimum.

input_ids, attention_mask, position_ids
past_key_values.0.key, past_key_values.0.value -> present.0.key, present.0.value
past.0.recurrent -> present.0.recurrent     the state of an operator
past.0.conv      -> present.0.conv          the last values before a convolution or a delay
past.0.sum       -> present.0.sum           a cumulative value
past.NAME        -> present.NAME            the values so far of the input NAME
past_key_values.0.encoder.key, past_key_values.0.encoder.value, encoder_NAME, encoder.0
                                            what encoder.onnx yields: keys and values of cross-attention, the model's
                                            input NAME as it is, other values
"""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

from gatecc.decoder.emit.closed import MASK, Closed, Held
from gatecc.decoder.plan import Plan
from gatecc.ir.program import origin

TOKENS, LOGITS = "input_ids", "logits"
_OF_KIND = {"state": "recurrent", "taps": "conv", "scan": "sum"}
_INDEX = re.compile(r"^(.*?)(?:^|\.)(\d+)(?:\.|$)")


def input_names(step: Closed) -> list[str]:
    """The names of the program's inputs, in their order."""
    held = {h.source: past for h, (past, _) in zip(step.held, state_names(step), strict=True)}
    names = {step.tokens: TOKENS, **({} if step.mask is None else {step.mask: MASK}), **held}
    of_context = context_names(step.plan)
    names |= {made: of_context[captured] for captured, made in step.context.items()}
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


def context_names(plan: Plan) -> dict[fx.Node, str]:
    """The names of what the steps read of a context, by the nodes of the captured program."""
    roles = _roles(plan)
    layers = dict(zip(roles, _numbered([origin(node).owner for node in roles]), strict=True))
    seen, others, found = Counter[str](), 0, dict[fx.Node, str]()
    for node in plan.context:
        if node in roles:
            key = f"past_key_values.{layers[node]}.encoder.{roles[node]}"
            number, seen[key] = seen[key], seen[key] + 1
            found[node] = key + (f"_{number}" if number else "")
        elif node.op == "placeholder":
            found[node] = node.name if node.name.startswith("encoder") else f"encoder_{node.name}"
        else:
            found[node], others = f"encoder.{others}", others + 1
    return found


def _roles(plan: Plan) -> dict[fx.Node, str]:
    """What the steps read of a context as keys or as values: the keys of an attention, or these in another layout."""
    found: dict[fx.Node, str] = {}
    for pair in plan.cross:
        for role, start in zip(("key", "value"), pair, strict=True):
            reached = [start]
            for node in reached:
                if node in plan.context:
                    found.setdefault(node, role)
                    continue
                reached += [user for user in node.users if user not in reached and plan.depends_on(user) == "context"]
    return {node: found[node] for node in plan.context if node in found}


def layer_numbers(step: Closed) -> list[int | None]:
    """The layer of each state: the first number in the name of its module, if all have one of one list of layers; else
    the layers are counted. None for values per token."""
    numbers = iter(_numbered([h.slot.owner for h in step.held if h.slot is not None]))
    return [None if h.slot is None else next(numbers) for h in step.held]


def _numbered(owners: list[str]) -> list[int]:
    """The layers of modules of these names."""
    found = [_INDEX.match(owner) for owner in owners]
    if len({m and m[1] for m in found}) == 1 and None not in found:
        return [int(m[2]) for m in found if m]
    counted: dict[str, int] = {}
    named = [owner if m is None else m[0] for owner, m in zip(owners, found, strict=True)]
    return [counted.setdefault(layer, len(counted)) for layer in named]
