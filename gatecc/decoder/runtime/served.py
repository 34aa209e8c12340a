"""ServedState: a decoder's state in the place of a KV cache of transformers."""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from typing import Any, cast

import torch
from torch import nn

from gatecc.decoder.runtime.decoder import Decoder
from gatecc.decoder.runtime.state import State
from gatecc.errors import ArgumentError, CallNotCapturedError

NAMES = ("cache", "past_key_values")  # what models call the cache, the newer name first
_LOGITS = "logits_to_keep"


class ServedState:
    """What a loop of transformers asks of a cache: its length, and to be reordered by a beam search.

    ``state`` is replaced in each call of the model and never changed, so a copy is a branch.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self, made: Decoder, state: State | None = None) -> None:
        self.decoder, self.state = made, state

    def __deepcopy__(self, memo: dict[int, Any]) -> ServedState:
        return ServedState(self.decoder, self.state)

    def __len__(self) -> int:
        return len(self.decoder.plan.slots)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens that were read."""
        return 0 if self.state is None else int(self.state["length"])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let sample i go on from what sample ``beam_idx[i]`` has read."""
        if self.state is not None:
            self.state = self.decoder.memory.reordered(self.state, beam_idx)

    def crop(self, maximum_length: int) -> None:
        """Raises CallNotCapturedError: what was read into a state cannot be taken out of it."""
        raise CallNotCapturedError(
            "a decoder's state cannot be cropped",
            found=f"{self.get_seq_length()} tokens read, crop({maximum_length})",
            do="keep a copy of the state from before (copy.deepcopy): copies share their memory",
        )

    def call(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the model on tokens that come after those of the state. Raises ArgumentError for other inputs."""
        names = list(inspect.signature(model.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids = given.pop("input_ids", None)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            raise _unread("input_ids", ids)
        keep, wanted = given.pop(_LOGITS, 0), given.pop("return_dict", None)
        values = self._values(ids, given)
        for name, x in given.items():
            if isinstance(x, torch.Tensor) or (name in ("output_hidden_states", "output_attentions") and x):
                raise _unread(name, x)
        logits, self.state = self.decoder.prefill(ids, self.state, **values)
        kept = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        return (kept, self) if wanted is False else _output()(kept, self)

    def _values(self, ids: torch.Tensor, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The values that come with the new tokens, taken out of ``given``; a mask may be of all tokens."""
        values: dict[str, torch.Tensor] = {}
        for node in self.decoder.plan.inputs.history:
            x = given.pop(node.name, None)
            if isinstance(x, torch.Tensor):
                values[node.name] = x[:, -ids.shape[1] :].expand_as(ids)
        mask = given.get("attention_mask")  # of a decoder that takes none
        if isinstance(mask, torch.Tensor) and bool(mask.all()):
            del given["attention_mask"]
        if counts(given.get("position_ids"), self.get_seq_length()):
            del given["position_ids"]
        return values


def counts(positions: Any, past: int = 0) -> bool:
    """Whether position ids are those that a model takes without them: past, past + 1, ... in every sample."""
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2:
        return False
    wanted = torch.arange(past, past + positions.shape[1], device=positions.device)
    return bool((positions == wanted).all())


def _unread(name: str, found: Any) -> ArgumentError:
    shown = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else str(found)
    return ArgumentError(
        "the state of a decoder goes on with tokens alone",
        where=name,
        found=shown,
        expected="input_ids of (batch, length), and the values per token that generate began with",
        do="call the model without the state (use_cache=False)",
    )


@functools.cache
def _output() -> Any:
    """(logits, state) -> the output of a language model."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = cast("Any", CausalLMOutputWithPast)
    name = next(n for n in NAMES if n in {f.name for f in fields(output)})
    return lambda logits, state: output(**{"logits": logits, name: state})
