"""quantized_steps: what decode.onnx in fewer bits is measured on: whole prompts, and a step behind some tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gatecc.export.accuracy import tokens_of
from gatecc.export.carried import size_of
from gatecc.export.decode import Decode
from gatecc.export.encoder import Encoding
from gatecc.export.padding import tokens_first

BEFORE = 64  # tokens before the step whose time is measured


@dataclass(frozen=True)
class Prompt:
    """Inputs of decode.onnx by name, and those of encoder.onnx. ``ids``: (B, N); ``mask``: (B, N), None without
    padding."""

    feeds: dict[str, Tensor]
    ids: Tensor
    mask: Tensor | None
    encoded: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def of_encoder(self, encoder: Encoding) -> dict[str, Tensor]:
        """The inputs of encoder.onnx."""
        return {name: x for name, x in self.encoded.items() if name not in encoder.passed.values()}


def prompt(decode: Decode, names: Sequence[str], leaves: Sequence[Tensor]) -> Prompt | None:
    """The inputs of a model as a prompt of its step; None if they are not what it takes.

    What is longer than the positions of the step is cut.
    """
    given = dict(zip(names, leaves, strict=True))
    encoded = {name: given[name] for name in (decode.encoder.inputs if decode.encoder else ()) if name in given}
    own = {name: x for name, x in given.items() if name not in encoded}
    found, mask = tokens_of(list(own), list(own.values()))
    ids = own.get("input_ids", found)
    if ids is None or any(name not in given for name in decode.values):
        return None
    length = min(ids.shape[1], decode.context_length or ids.shape[1])
    ids = ids[:, :length]
    mask = mask[:, :length] if mask is not None and decode.padding != "none" else None
    values = {name: given[name][:, :length] for name in decode.values}
    if mask is not None and decode.padding == "right":
        places = tokens_first(mask.bool().long())
        ids, mask = ids.gather(1, places), mask.gather(1, places)
        values = {name: x[torch.arange(len(x))[:, None], places] for name, x in values.items()}
    masked = {} if mask is None else {"attention_mask": mask}
    passed = {name: given[of] for name, of in (decode.encoder.passed if decode.encoder else {}).items()}
    return Prompt({**_feeds(decode, ids, 0, values), **masked, **passed}, ids, mask, encoded)


def step(decode: Decode, of: Prompt) -> tuple[int, dict[str, Tensor]]:
    """How many tokens there were, and the inputs for the next one of the first sample."""
    past = min(BEFORE, (decode.context_length or BEFORE + 1) - 1)
    values = {name: of.feeds[name][:1, :1] for name in decode.values}
    return past, _feeds(decode, of.ids[:1, :1], past, values)


def _feeds(decode: Decode, ids: Tensor, past: int, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    feeds = {"input_ids": ids, **values}
    if decode.mask:
        feeds["attention_mask"] = torch.ones(len(ids), past + ids.shape[1], dtype=torch.int64)
    for state in decode.states:
        shape = [past if axis == state.grows else size_of(size, len(ids)) for axis, size in enumerate(state.shape)]
        feeds[state.input] = torch.full(shape, state.fill, dtype=getattr(torch, state.dtype))
    return feeds
