"""ShiftRows: a vector added to some rows of a matrix, with the rows of before kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatecc.ir.weights.effect import Effect, Tensors, changed_in, editable, holder_of

NAME = "shifted"
_NEAR = 4  # units in the last place: what a cast after the edit may move


class ShiftedRows(nn.Module):
    """What undoes a shift: ``rows`` (n,), the ``original`` rows (n, d) and the ``shift`` (d,). It computes nothing."""

    def __init__(self, rows: Tensor, original: Tensor, shift: Tensor, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed  # rows of the product are columns of the matrix, as in a Conv1D of GPT-2
        self.register_buffer("rows", rows)
        self.register_buffer("original", original)
        self.register_buffer("shift", shift)

    def restored(self, weight: Tensor) -> Tensor:
        """The matrix without the shift: rows that nobody trained since are those of before, bitwise, others lose it."""
        rows, original, shift = (self.get_buffer(name) for name in ("rows", "original", "shift"))
        out = weight.detach().clone()
        view = out.T if self.transposed else out
        now = view[rows]
        before, step = original.to(now), shift.to(now)
        near = (now - (before + step)).abs() <= _NEAR * torch.finfo(now.dtype).eps * (before.abs() + step.abs())
        view[rows] = torch.where(near.all(1, keepdim=True), before, now - step)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """A container runs what lies on it: nothing is done."""
        return x


@dataclass(frozen=True, eq=False)
class ShiftRows(Effect):
    """Add ``shift`` (d,) to ``rows`` (n,) of a matrix (O, d), or to its columns if it is ``transposed``.

    The rows of before stay beside the matrix, as buffers of a module `NAME`: saved, moved and cast with it.
    """

    rows: Tensor | None = None
    shift: Tensor | None = None
    transposed: bool = False

    def apply(self, layer: nn.Module) -> dict[str, int]:
        if self.rows is None or self.shift is None:
            raise ValueError(f"{self.path}: a recorded effect cannot be done again")
        weight = editable(layer, self.path)
        with torch.no_grad():
            view = weight.T if self.transposed else weight
            rows, shift = self.rows.to(weight.device), self.shift.to(weight)
            kept = ShiftedRows(rows, view[rows].clone(), shift, transposed=self.transposed)
            view[rows] = view[rows] + shift
        holder, _ = holder_of(layer, self.path)
        holder.add_module(NAME, kept.train(holder.training))
        return {}

    def undo(self, layer: nn.Module) -> None:
        holder, name = holder_of(layer, self.path)
        kept = holder._modules.get(NAME)
        if isinstance(kept, ShiftedRows):
            weight = holder.get_parameter(name)
            weight.data.copy_(kept.restored(weight))
            del holder._modules[NAME]

    def describe(self, layer: nn.Module | None = None) -> str:
        return f"shift rows of {self.path}"

    def before(self, state: Tensors, same: Mapping[str, str]) -> Tensors:
        prefix = self.path.rpartition(".")[0]
        prefix = f"{prefix}.{NAME}." if prefix else f"{NAME}."
        rows, original, shift = (state[prefix + name] for name in ("rows", "original", "shift"))
        kept = ShiftedRows(rows, original, shift, transposed=self.transposed)
        rest = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        return changed_in(self.path, rest, same, kept.restored)

    def to_json(self) -> list[object]:
        return [*super().to_json(), self.transposed]

    @classmethod
    def of(cls, path: str, *numbers: object) -> Effect:
        return cls(path, transposed=bool(numbers[0]))
