"""Decoder: the object that the user holds. It picks a program, finds room in the state, and runs one step."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx

from gatecc.decoder.analysis.context import Context
from gatecc.decoder.emit.step import Step, write_step
from gatecc.decoder.emit.tables import Tables
from gatecc.decoder.plan import Plan
from gatecc.decoder.runtime.generate import Generation
from gatecc.decoder.runtime.state import Memory, State
from gatecc.errors import ArgumentError

_FIRST = 64  # positions that a growing state starts with
_LARGEST = 1 << 26  # bytes that a table over queries and keys may take; beyond, its rows are computed in each step


class Program:
    """One step program: its graph module, and its forward bound to plain attributes (nn.Module's lookup is slow)."""

    def __init__(self, plan: Plan, step: Step) -> None:
        self.module = step.module
        self.tables = Tables(plan, step.tables)
        self._forward: Any = type(self.module).forward
        self._weights = SimpleNamespace(**step.weights)

    def __call__(self, *inputs: Any) -> tuple[torch.Tensor, tuple[Any, ...]]:
        return self._forward(self._weights, *inputs)


class Decoder(Generation):
    """A model's decode step, derived from its full-sequence graph: see gatecc.decoder.

    ``program`` is the graph module of the single step, ``plan`` what it was written from.
    """

    def __init__(self, plan: Plan, capacity: int | None) -> None:
        self.plan, self.fixed = plan, capacity
        self.memory = Memory(plan)
        self.context = Context(plan)
        self._live = self._find_live()
        self._programs: dict[tuple[bool, bool], Program] = {}
        self.bound = plan.lengths.bound

    def _find_live(self) -> frozenset[fx.Node]:
        live: frozenset[fx.Node] = frozenset()
        while True:
            more = Tables(self.plan, write_step(self.plan, single=False, live=live).tables).unstable()
            if not more:
                return live
            live |= more

    @property
    def program(self) -> fx.GraphModule:
        """The graph module of the step for one new token."""
        return self._program(True, 1).module

    def tables(self, *, single: bool, capacity: int = _FIRST) -> list[fx.Node]:
        """The position nodes that a step program reads from tables."""
        return self._program(single, capacity).tables.nodes

    def _program(self, single: bool, capacity: int) -> Program:
        rows = self._too_large(capacity)
        if (single, rows) not in self._programs:
            live = self._live | (self._square() if rows else frozenset())
            step = write_step(self.plan, single=single, live=live)
            self._programs[single, rows] = Program(self.plan, step)
        return self._programs[single, rows]

    def _square(self) -> frozenset[fx.Node]:
        """The position nodes over queries and keys."""
        lengths = self.plan.lengths
        return frozenset(n for n in self.plan.nodes if self.plan.kind(n) == "position" and len(lengths.axes(n)) > 1)

    def _too_large(self, capacity: int) -> bool:
        return capacity * capacity * 4 > _LARGEST

    # --- the public face ---

    def init_state(self, batch: int, *, capacity: int | None = None, context: Mapping[str, Any] | None = None) -> State:
        """The state before the first token, with room for ``capacity`` tokens (by default it grows).

        ``context``: the inputs that are no tokens, by name. An encoder runs here, and not again.
        """
        if batch < 1:
            raise ArgumentError("a state needs a sample", found=str(batch), expected="batch >= 1")
        held = self.context(batch, context or {})
        return self.memory.empty(batch, capacity or self.fixed or min(_FIRST, self.bound), held)

    def prefill(
        self, ids: torch.Tensor, state: State | None = None, **values: torch.Tensor
    ) -> tuple[torch.Tensor, State]:
        """Run T tokens at once. ids: (B, T) -> logits (B, T, V), the state after them.

        ``values``: the inputs with a value per token, (B, T) each: ``attention_mask`` (0 for padding on the left) and
        ``position_ids``, if the model was captured with them. Without them every token counts. Without a state they are
        also the inputs that are no tokens (``input_ids`` of an encoder): see init_state.
        """
        if ids.dim() < 2 or not ids.shape[1]:
            raise ArgumentError("no tokens", found=f"shape {tuple(ids.shape)}", expected="(batch, length)")
        if state is None:
            given = {name: x for name, x in values.items() if name in self.context.names}
            values = {name: x for name, x in values.items() if name not in given}
            state = self.init_state(ids.shape[0], context=given)
        return self._advance(ids, state, values)

    def step(self, ids: torch.Tensor, state: State, **values: torch.Tensor) -> tuple[torch.Tensor, State]:
        """Run the next token of every sample. ids: (B,) or (B, 1) -> logits (B, V) or (B, 1, V), the next state.

        More than one token at once is allowed, as in prefill. ``state`` stays as it is and may be stepped again.
        """
        if ids.dim() == 1:
            logits, state = self._advance(ids.unsqueeze(1), state, values)
            return logits[:, 0], state
        return self.prefill(ids, state, **values)

    def _advance(
        self, ids: torch.Tensor, state: State, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, State]:
        past, new = int(state["length"]), ids.shape[1]
        with torch.no_grad():
            fresh = self.memory.with_room(state, past, new)
            capacity = self.memory.capacity(fresh) or _rounded(past + new)
            program = self._program(new == 1, capacity)
            reach = program.tables.reach(capacity)
            self._check(ids, state, past + new, reach)
            self._write_history(fresh, values, ids, past)
            logits, changed = program(
                ids,
                past,
                program.tables.at(ids.shape[0], reach),
                fresh["slots"],
                [int(start) for start in fresh["starts"]],
                fresh["history"],
                fresh["context"],
            )
            fresh["written"].fill_(past + new)
        fresh["length"] = torch.tensor(past + new)
        fresh["slots"] = [old if c is None else c for c, old in zip(changed, fresh["slots"], strict=True)]
        return logits, self.memory.trimmed(fresh, past + new) if new > 1 else fresh

    def _check(self, ids: torch.Tensor, state: State, length: int, reach: int) -> None:
        most = reach if self.fixed is None else min(self.fixed, reach)
        if length > most:
            what = "the model has positions" if most == reach else "the decoder was made with room"
            raise ArgumentError(f"{what} for {most} tokens", found=f"{length} tokens", expected=f"at most {most}")
        batch = self.memory.batch(state)
        if batch is not None and batch != ids.shape[0]:
            raise ArgumentError("the state is of another batch", found=f"{ids.shape[0]} samples", expected=str(batch))

    # --- values per token ---

    def _write_history(self, state: State, values: Mapping[str, torch.Tensor], ids: torch.Tensor, past: int) -> None:
        names = [node.name for node in self.plan.inputs.history]
        unknown = set(values) - set(names)
        if unknown:
            raise ArgumentError(
                "the model was captured without this input",
                found=", ".join(sorted(unknown)),
                expected=", ".join(names) or "no value per token",
                do="derive the decoder from example inputs that hold it: {'input_ids': ids, 'attention_mask': mask}",
            )
        new = ids.shape[1]
        for name, held in zip(names, state["history"], strict=True):
            given = values.get(name)
            if given is None:
                given = self._assumed(name, names, state, past, new)
            held.narrow(1, past, new).copy_(given)

    def _assumed(self, name: str, names: list[str], state: State, past: int, new: int) -> torch.Tensor | int:
        """What an input is when it is not given: every token counts, and positions count the tokens that do."""
        if name in ("attention_mask", "decoder_attention_mask"):
            return 1
        if name == "token_type_ids":
            return 0
        if name != "position_ids":
            raise ArgumentError("a value per token is missing", found="none", expected=name)
        if "attention_mask" not in names:
            return torch.arange(past, past + new)
        seen = state["history"][names.index("attention_mask")][:, : past + new]
        return (seen.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _rounded(length: int) -> int:
    """The next power of two: tables for a state that has no buffers to be as long as."""
    return max(_FIRST, 1 << (length - 1).bit_length())
