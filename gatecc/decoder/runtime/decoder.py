"""Decoder: the object that the user holds. It picks a step, finds room in the state, and runs it."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import fx

from gatecc.decoder.emit import lookups
from gatecc.decoder.emit.closed import Closed, write_closed
from gatecc.decoder.emit.encoder import Encoder, write_encoder
from gatecc.decoder.emit.lower import lower
from gatecc.decoder.emit.record import record
from gatecc.decoder.emit.step import Step, write_step
from gatecc.decoder.emit.tables import Tables
from gatecc.decoder.plan import Plan
from gatecc.decoder.runtime.context import Context
from gatecc.decoder.runtime.generate import Generation
from gatecc.decoder.runtime.speculate import Speculated, speculate
from gatecc.decoder.runtime.state import Memory, State
from gatecc.errors import ArgumentError
from gatecc.ir.program import Program
from gatecc.passes.exit.rule import AcceptanceRule

_FIRST = 64  # positions that a growing state starts with
_NEW = 5  # tokens that the example of a step for several runs
_LARGEST = 1 << 26  # bytes that a table over queries and keys may take; beyond, its rows are computed in each step


class Lowered:
    """One step as it runs: its forward is bound to plain attributes (nn.Module's lookup is slow)."""

    def __init__(self, step: Step) -> None:
        self.step, self.module = step, lower(step)
        self.tables = Tables(step.plan, step.tables)
        self._forward: Any = type(self.module).forward
        names = {str(node.target) for node in self.module.graph.find_nodes(op="get_attr")}
        self._weights = SimpleNamespace(**{name: getattr(self.module, name) for name in names})

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self._forward(self._weights, *inputs)


class _Call(NamedTuple):
    """One call of a step."""

    step: Lowered
    state: State
    inputs: list[Any]


class Decoder(Generation):
    """A model's decode step, derived from its full-sequence graph: see gatecc.decoder.

    ``plan`` is what its steps are written from: `program` yields them.
    """

    def __init__(self, plan: Plan, capacity: int | None) -> None:
        self.plan, self.fixed = plan, capacity
        self.memory = Memory(plan)
        self.context = Context(plan)
        self._live = self._find_live()
        self._steps: dict[tuple[bool, bool], Lowered] = {}
        self.bound = plan.lengths.bound

    def _find_live(self) -> frozenset[fx.Node]:
        live: frozenset[fx.Node] = frozenset()
        while True:
            more = Tables(self.plan, write_step(self.plan, single=False, live=live).tables).unstable()
            if not more:
                return live
            live |= more

    def program(self, *, single: bool = True) -> Program:
        """The step for one token (or for several) as a Program of ATen operators, before it is lowered.

        Its placeholders are listed in `gatecc.decoder.emit.step`. Its example is the end of the model's example inputs,
        after a prefill of what comes before.
        """
        step = self._step(single, 1).step
        if not step.program.example:
            record(step, self._example(single))
        return step.program

    def _example(self, single: bool) -> list[Any]:
        """What the step is called with at the end of the example inputs."""
        example = dict(zip(self.plan.program.placeholders, self.plan.program.example, strict=True))
        inputs = self.plan.inputs
        ids, values = example[inputs.tokens], {n.name: example[n] for n in inputs.history}
        values |= {n.name: example[n] for n in inputs.carried}
        past = ids.shape[1] - (1 if single else _NEW)
        state = self.init_state(ids.shape[0], context={n.name: example[n] for n in inputs.context})
        if past:
            _, state = self.prefill(ids[:, :past], state, **{name: x[:, :past] for name, x in values.items()})
        call = self._prepared(ids[:, past:], state, {name: x[:, past:] for name, x in values.items()})
        return call.inputs

    def closed(self, capacity: int, *, counted: bool = False) -> Closed:
        """The step for any number of tokens as a function of tensors alone: `gatecc.export` writes it as a file.

        ``capacity``: how many tokens its tables of positions are made for, if it has any. ``counted``: attention counts
        the tokens of each row by a mask.
        """
        self.memory.thoughts.check_closed()
        return write_closed(self.plan, self._live, self.reach(capacity), counted=counted)

    def encoder(self) -> Encoder | None:
        """What `closed` needs of the inputs that are no tokens, as a function of them; None if nothing is computed of
        them."""
        return write_encoder(self.plan)

    def reach(self, wanted: int) -> int:
        """The largest length up to ``wanted`` that the model has positions for."""
        step = write_step(self.plan, single=False, live=self._live | self._square())
        return lookups.reach(self.plan, Tables(self.plan, step.tables).reach(wanted))

    def lowered(self, *, single: bool = True) -> fx.GraphModule:
        """What runs in the place of `program`: the same step as a straight line of Python calls."""
        return self._step(single, 1).module

    def tables(self, *, single: bool, capacity: int = _FIRST) -> list[fx.Node]:
        """The position nodes that a step reads from tables."""
        return self._step(single, capacity).tables.nodes

    def _step(self, single: bool, capacity: int) -> Lowered:
        rows = self._too_large(capacity)
        if (single, rows) not in self._steps:
            live = self._live | (self._square() if rows else frozenset())
            self._steps[single, rows] = Lowered(write_step(self.plan, single=single, live=live))
        return self._steps[single, rows]

    def _square(self) -> frozenset[fx.Node]:
        """The position nodes over queries and keys."""
        lengths = self.plan.lengths
        return frozenset(n for n in self.plan.dependence.positions if len(lengths.axes(n)) > 1)

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
        also the inputs that are no tokens (``input_ids`` of an encoder): see init_state. What a step leaves for the
        next one (a soft embedding, (B, T, C)) may be given as well, in the place of what the state holds.
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
            step, fresh, inputs = self._prepared(ids, state, values)
            logits, *changed = step(*inputs)
            fresh["written"].fill_(past + new)
            fresh |= self.memory.thoughts.after(ids, state, logits)
        fresh["length"] = torch.tensor(past + new)
        fresh["slots"] = [old if c is None else c for c, old in zip(changed, fresh["slots"], strict=True)]
        return logits, self.memory.trimmed(fresh, past + new) if new > 1 else fresh

    def _prepared(self, ids: torch.Tensor, state: State, values: Mapping[str, torch.Tensor]) -> _Call:
        """The step that runs these tokens, the state that it writes to, and its inputs."""
        past, new = int(state["length"]), ids.shape[1]
        fresh = self.memory.with_room(state, past, new)
        capacity = self.memory.capacity(fresh) or _rounded(past + new)
        step = self._step(new == 1, capacity)
        reach = step.tables.reach(capacity)
        self._check(ids, state, past + new, reach)
        values, carried = self.memory.thoughts.given(ids, state, values)
        self._write_history(fresh, values, ids, past)
        starts = [int(start) for start in fresh["starts"]]
        tables = step.tables.at(ids.shape[0], reach)
        return _Call(
            step, fresh, [ids, past, *fresh["slots"], *starts, *fresh["history"], *fresh["context"], *carried, *tables]
        )

    def _check(self, ids: torch.Tensor, state: State, length: int, reach: int) -> None:
        most = reach if self.fixed is None else min(self.fixed, reach)
        if length > most:
            what = "the model has positions" if most == reach else "the decoder was made with room"
            raise ArgumentError(f"{what} for {most} tokens", found=f"{length} tokens", expected=f"at most {most}")
        batch = self.memory.batch(state)
        if batch is not None and batch != ids.shape[0]:
            raise ArgumentError("the state is of another batch", found=f"{ids.shape[0]} samples", expected=str(batch))

    def speculate(
        self,
        draft: Decoder,
        ids: torch.Tensor,
        max_new_tokens: int,
        *,
        rule: AcceptanceRule | None = None,
        bound: int = 8,
    ) -> Speculated:
        """Continue one prompt (1, N) by the best tokens, those of `generate`, with fewer calls of this model.

        ``draft``, the decoder of a smaller model of the same tokens, goes on with up to ``bound`` of them; this one
        reads them at once and keeps those that it would have taken, and one more. ``rule`` ends a draft early: where 1
        - Π p of its tokens' acceptances exceeds its threshold (`Acceptance`). Where both are as good as tied, rounding
        decides. Raises ArgumentError.
        """
        return speculate(self, draft, ids, max_new_tokens, rule, bound)

    def thoughts(self, ids: torch.Tensor, state: State) -> list[torch.Tensor]:
        """What the tokens (B, T) are mixed with if they are read now: (B, T, C) for each carried input."""
        return self.memory.thoughts.given(ids, state, {})[1]

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
        """The value of an input that is not given: every token counts, and positions count the tokens that do."""
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
    """The next power of two, as the length of tables for a state whose buffers set none."""
    return max(_FIRST, 1 << (length - 1).bit_length())
