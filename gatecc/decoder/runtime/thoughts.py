"""Thoughts: what a step leaves for the next one besides keys and values: the soft embedding of its logits.

In the graph it is an input that `gatecc::carried` reads. Here the state holds it: it is read from the end of a prompt
(a call with several tokens, or the first) until a sample reads a token that ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.decoder.analysis.inputs import CARRIED
from gatecc.decoder.plan import Plan
from gatecc.decoder.refuse import refusal
from gatecc.errors import ArgumentError, DecoderError
from gatecc.ops.carried import soft_embedding


class Thoughts:
    """The carried inputs of a plan, each with its table (V, C), and the tokens that end them."""

    def __init__(self, plan: Plan) -> None:
        self.nodes = plan.inputs.carried
        self.tables: list[Tensor] = []
        until = set[int]()
        for node in self.nodes:
            reader = next(user for user in node.users if user.target is CARRIED)
            _, table, ends = reader.args
            assert isinstance(table, fx.Node)
            assert isinstance(ends, list | tuple)
            held = plan.tensor(table)
            vocabulary = plan.logits.meta["val"].shape[-1]
            if held.shape[0] != vocabulary:
                raise refusal(reader, f"its table has {held.shape[0]} tokens, and the logits {vocabulary}")
            self.tables.append(held)
            until |= {int(str(token)) for token in ends}
        self.until = torch.tensor(sorted(until), dtype=torch.int64)

    def check_closed(self) -> None:
        """A file holds no such state yet. Raises DecoderError."""
        if self.nodes:
            raise DecoderError(
                "the step carries more than keys and values from token to token",
                where=self.nodes[0].name,
                found="a soft embedding of the logits",
                expected="a step whose states are those of its operators",
                do="export the model alone (decode=False), and let gatecc.decoder run it",
            )

    def empty(self, batch: int) -> dict[str, Any]:
        """Nothing was thought yet."""
        if not self.nodes:
            return {}
        carried = [
            torch.zeros((batch, t.shape[1]), dtype=n.meta["val"].dtype, device=t.device)
            for n, t in zip(self.nodes, self.tables, strict=True)
        ]
        return {"carried": carried, "thinks": torch.zeros(batch, dtype=torch.bool, device=self.tables[0].device)}

    def reordered(self, state: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
        """As `Memory.reordered`."""
        if not self.nodes:
            return {}
        taken = [x.index_select(0, index.to(x.device)) for x in state["carried"]]
        return {"carried": taken, "thinks": state["thinks"].index_select(0, index.to(state["thinks"].device))}

    def given(
        self, ids: Tensor, state: Mapping[str, Any], values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The values without the carried ones, and what the tokens (B, T) read, (B, T, C) each.

        Without values it is the state's for the first token, and nothing for those behind it. Raises ArgumentError.
        """
        rest, found = dict(values), list[Tensor]()
        for i, node in enumerate(self.nodes):
            held = state["carried"][i]
            wanted = (*ids.shape[:2], held.shape[1])
            x = rest.pop(node.name, None)
            if x is None:
                x = held.new_zeros(wanted)
                x[:, 0] = torch.where((state["thinks"] & ~self._ends(ids[:, :1])).unsqueeze(1), held, 0)
            elif x.shape != wanted:
                raise ArgumentError(
                    "an input does not belong to the tokens",
                    where=node.name,
                    found=f"shape {tuple(x.shape)}",
                    expected=str(wanted),
                )
            found.append(x.to(held.dtype))
        return rest, found

    def after(self, ids: Tensor, state: Mapping[str, Any], logits: Tensor) -> dict[str, Any]:
        """What the next step reads. ids: (B, T), logits: (B, T, V)"""
        if not self.nodes:
            return {}
        begins = ids.shape[1] > 1 or int(state["length"]) == 0
        goes_on = state["thinks"] & ~self._ends(ids)
        left = [
            soft_embedding(logits[:, -1], table).to(x.dtype)
            for table, x in zip(self.tables, state["carried"], strict=True)
        ]
        return {"carried": left, "thinks": torch.ones_like(goes_on) if begins else goes_on}

    def _ends(self, ids: Tensor) -> Tensor:
        return torch.isin(ids, self.until.to(ids.device)).any(1)
