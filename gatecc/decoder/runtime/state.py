"""State: what a decoder remembers between calls, as a plain dict and lists of tensors.

    length    () int64: the number of tokens so far
    written   () int64: how far the buffers are filled. States that follow one another share buffers; a state that is
              not the newest one of its buffers (another was stepped from it before) gets copies before it is stepped
    slots     one tensor per slot: keys and values with room for more, last inputs, cumulative values, operators' states
              (ragged ones have room for more, too)
    starts    () int64 for each window: the position of the first key that its buffers hold
    history   (B, capacity): the values per token
    context   what does not change
    carried   (B, C) for each: what the last step left for the next one
    thinks    (B,) of bool: whether it is read

Buffers are only ever written behind the last token of every state that reads them, so no state changes under its
holder. Where there is no more room, a larger buffer is made; for a window, one without the positions that have left it.
"""

from __future__ import annotations

from typing import Any

import torch

from gatecc.decoder.plan import Plan
from gatecc.decoder.rules.slots import Slot
from gatecc.decoder.runtime.thoughts import Thoughts
from gatecc.ir.sizes import expression, symbols
from gatecc.ops import registry
from gatecc.ops.registry import StepRule

State = dict[str, Any]


class Memory:
    """Makes states and finds room in them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.slots, self.windows = plan, plan.slots, plan.windows
        self.thoughts = Thoughts(plan)

    def empty(self, batch: int, capacity: int, context: list[torch.Tensor]) -> State:
        """The state before the first token."""
        zero = torch.zeros((), dtype=torch.int64)
        return {
            "length": zero,
            "written": zero.clone(),
            "slots": [self._slot(slot, batch, self._room(slot, capacity)) for slot in self.slots],
            "starts": [zero.clone() for _ in self.windows],
            "history": [self._history(node, batch, capacity) for node in self.plan.inputs.history],
            "context": context,
            **self.thoughts.empty(batch),
        }

    def _room(self, slot: Slot, capacity: int) -> int:
        if slot.kind != "keys":
            return slot.count
        return capacity if slot.span.window is None else min(capacity, 2 * slot.span.window)

    def _slot(self, slot: Slot, batch: int, room: int) -> torch.Tensor:
        """One buffer: sizes from the capture, ``room`` positions along the slot's axis (one value for a scan)."""
        like, lengths = slot.like, self.plan.lengths
        shape: list[int] = []
        for axis, size in enumerate(like.shape):
            if slot.kind != "state" and axis == slot.axis:
                shape.append(1 if slot.kind == "scan" else room)
            else:
                shape.append(int(expression(size).xreplace(dict.fromkeys(lengths.batch, batch))))
        return torch.full(shape, slot.fill, dtype=like.dtype, device=like.device)

    def _history(self, node: Any, batch: int, capacity: int) -> torch.Tensor:
        like = node.meta["val"]
        return torch.zeros((batch, capacity), dtype=like.dtype, device=like.device)

    def batch(self, state: State) -> int | None:
        """The number of samples that a state is of; None if it remembers nothing yet."""
        for slot, buffer in zip(self.slots, state["slots"], strict=True):
            for size, held in zip(slot.like.shape, buffer.shape, strict=True):
                if expression(size) in self.plan.lengths.batch:
                    return held
        return state["history"][0].shape[0] if state["history"] else None

    def reordered(self, state: State, index: torch.Tensor) -> State:
        """The state in which sample i has read what sample ``index[i]`` had. index: (batch,)"""
        samples = index.numel()
        context = zip(state["context"], [node.meta["val"] for node in self.plan.context], strict=True)
        return {
            **state,
            "written": state["written"].clone(),
            "slots": self._reordered(state["slots"], index),
            "history": [x.index_select(0, index.to(x.device)) for x in state["history"]],
            "context": [self._taken(x, like, index, samples) for x, like in context],
            **self.thoughts.reordered(state, index),
        }

    def _reordered(self, held: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
        """The slots of other samples; a state with ragged parts as its operator does it."""
        made: dict[int, torch.Tensor] = {}
        for i, slot in enumerate(self.slots):
            if i in made:
                continue
            rule = self._rule(slot)
            if rule is None or rule.reordered is None:
                made[i] = self._taken(held[i], slot.like, index, index.numel())
                continue
            own = [j for j, other in enumerate(self.slots) if other.node is slot.node]
            made.update(zip(own, rule.reordered(slot.node, [held[j] for j in own], index), strict=True))
        return [made[i] for i in range(len(held))]

    @staticmethod
    def _rule(slot: Slot) -> StepRule | None:
        found = registry.find(slot.node.target) if slot.kind == "state" else None
        return None if found is None else found.step

    @staticmethod
    def bytes(state: State) -> int:
        """The memory that a state holds in its slots, with the room for more tokens."""
        return sum(x.numel() * x.element_size() for x in state["slots"])

    def _taken(self, x: torch.Tensor, like: torch.Tensor, index: torch.Tensor, samples: int) -> torch.Tensor:
        """Samples of a tensor, along its batch axis or along one that the batch is flattened into (batch x heads)."""
        for axis, size in enumerate(like.shape):
            if symbols(size) & self.plan.lengths.batch:
                apart = x.unflatten(axis, (samples, -1))
                return apart.index_select(axis, index.to(x.device)).flatten(axis, axis + 1)
        return x

    # --- room ---

    def capacity(self, state: State) -> int | None:
        """The number of positions that the buffers without a window hold; None if there is none."""
        for slot, buffer in zip(self.slots, state["slots"], strict=True):
            if slot.kind == "keys" and slot.span.window is None:
                return buffer.shape[slot.axis]
        return state["history"][0].shape[1] if state["history"] else None

    def with_room(self, state: State, past: int, new: int) -> State:
        """A new state for the tokens past .. past+new: the same buffers where they have room and are the newest."""
        slots, starts, history = list(state["slots"]), list(state["starts"]), list(state["history"])
        written = state["written"]
        if int(written) != past:
            written = torch.tensor(past)
            slots = [b.clone() if s.kind == "keys" or s.ragged else b for s, b in zip(self.slots, slots, strict=True)]
            history = [b.clone() for b in history]
        for i, width in enumerate(self.windows):
            starts[i] = self._slide(slots, width, starts[i], past, new)
        for i, slot in enumerate(self.slots):
            if slot.kind == "keys" and slot.span.window is None:
                slots[i] = _grown(slots[i], slot.axis, past, new)
        history = [_grown(b, 1, past, new) for b in history]
        return {**state, "written": written, "slots": slots, "starts": starts, "history": history}

    def _slide(self, slots: list[torch.Tensor], width: int, start: torch.Tensor, past: int, new: int) -> torch.Tensor:
        """Make room in the buffers of one window: positions that no query from ``past`` on sees are dropped."""
        own = self._own(width)
        first, room = int(start), slots[own[0]].shape[self.slots[own[0]].axis]
        if past + new - first <= room:
            return start
        later = max(first, past + 1 - width)
        return self._moved(slots, own, first, later, past, max(2 * width, past + new - later))

    def trimmed(self, state: State, length: int) -> State:
        """The state without what a long prefill left in the buffers of windows: they hold two windows at most."""
        slots, starts = list(state["slots"]), list(state["starts"])
        for i, width in enumerate(self.windows):
            own = self._own(width)
            first = int(starts[i])
            if slots[own[0]].shape[self.slots[own[0]].axis] > 2 * width:
                starts[i] = self._moved(slots, own, first, max(first, length + 1 - width), length, 2 * width)
        return {**state, "slots": slots, "starts": starts}

    def _own(self, width: int) -> list[int]:
        """The slots of one window."""
        return [i for i, slot in enumerate(self.slots) if slot.kind == "keys" and slot.span.window == width]

    def _moved(
        self, slots: list[torch.Tensor], own: list[int], first: int, later: int, past: int, room: int
    ) -> torch.Tensor:
        """Put the positions later .. past of buffers that begin at ``first`` into new ones."""
        for i in own:
            axis, old = self.slots[i].axis, slots[i]
            shape = list(old.shape)
            shape[axis] = room
            slots[i] = old.new_zeros(shape)
            slots[i].narrow(axis, 0, past - later).copy_(old.narrow(axis, later - first, past - later))
        return torch.tensor(later)


def _grown(buffer: torch.Tensor, axis: int, past: int, new: int) -> torch.Tensor:
    """The buffer, or one of twice its size with the same first ``past`` positions."""
    if past + new <= buffer.shape[axis]:
        return buffer
    shape = list(buffer.shape)
    shape[axis] = max(2 * shape[axis], past + new)
    grown = buffer.new_zeros(shape)
    grown.narrow(axis, 0, past).copy_(buffer.narrow(axis, 0, past))
    return grown
