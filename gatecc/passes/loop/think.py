"""Think: what a step predicted enters the embedding of the next token (HRPO)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.ops import opname
from gatecc.ir.program import shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site
from gatecc.ir.sizes import described_shape, on_example
from gatecc.passes.operands import beside, condition, place, stage

SHARPNESS = 8.0  # of the decay, as in Griffin
_WHOLE = 60.0  # the logit of a decay of 1
_LEAST = 1e-8


class HybridGate(nn.Module):
    """a = exp(-8 softplus(-Λ) r); y = a e + sqrt(1 - a² + 1e-8) (i s), with r, i = sigmoid of linear maps of e.

    At first a lies between the two shares of ``start`` where r is 1, evenly over the channels. Rows of s that are zero
    leave e as it is.
    """

    def __init__(self, channels: int, start: tuple[float, float]) -> None:
        super().__init__()
        self.keep, self.take = nn.Linear(channels, channels), nn.Linear(channels, channels)
        share = torch.linspace(*start, channels, dtype=torch.float64)
        whole = share >= 1
        logit = -torch.log(torch.expm1(-share.clamp(max=1 - 1e-9).log() / SHARPNESS))
        self.decay = nn.Parameter(torch.where(whole, _WHOLE, logit).to(torch.get_default_dtype()))

    def forward(self, e: Tensor, s: Tensor) -> Tensor:
        """e, s: (B, N, C) -> (B, N, C)"""
        r, i = torch.sigmoid(self.keep(e)), torch.sigmoid(self.take(e))
        a = torch.exp(-SHARPNESS * F.softplus(-self.decay.float()) * r.float())
        rest = torch.sqrt(1 - a.square() + _LEAST)
        mixed = a.to(e.dtype) * e + rest.to(e.dtype) * (i * s)
        return torch.where((s != 0).any(-1, keepdim=True), mixed, e)


class Thinking(nn.Module):
    """A language model with an input for what its steps predicted, ``soft`` (B, N, C), which nothing reads yet."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, soft: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids: (B, N) -> logits (B, N, V)"""
        given = () if attention_mask is None else (attention_mask,)
        found = self.model(input_ids, *given)
        return found if isinstance(found, Tensor) else found.logits


def remembered(soft: Tensor, table: Tensor, *until: int) -> Tensor:
    """The soft embeddings that steps are given, which a decoder keeps by itself."""
    return torch.ops.gatecc.carried(soft, table, list(until))


@dataclass(frozen=True)
class Think(Rewrite):
    """Mix what the step before predicted into the embedding of a token: e <- a e + sqrt(1 - a²) (i s).

    s = p E / |p|, the embedding of the softmax p of the logits before, E the table of the embedding. The gates a and
    i read e; a is a decay, a = exp(-8 softplus(-Λ) sigmoid(W e)), within ``start`` at first where the sigmoid is 1.
    In the graph s is the model's input ``soft`` (B, N, C), with zeros where a token is no thought: these stay as they
    are. A derived decoder keeps s in its state, from the end of a prompt until a sample reads a token of ``until``.
    """

    name = "think"

    soft: str = "soft"
    until: tuple[int, ...] = ()
    start: tuple[float, float] = (0.99, 0.999)

    def __post_init__(self) -> None:
        object.__setattr__(self, "until", tuple(self.until))
        low, high = self.start
        object.__setattr__(self, "start", (low, high))
        if not 0 < low <= high <= 1:
            raise ArgumentError("a decay is a share", found=f"start={self.start}", expected="0 < low <= high <= 1")
        if any(type(token) is not int or token < 0 for token in self.until):
            raise ArgumentError("thinking ends with a token", found=f"until={self.until}", expected="token ids")
        if self.site.kind != "embedding":
            raise ArgumentError(
                "thoughts are mixed into the embedding of tokens", found=str(self.site), expected="embedding[0]"
            )

    def contract(self) -> Contract:
        return identity_at_init(_LEAST**0.5) if self.start[0] == 1 else changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True)

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = stage(site, "out")
        e = value.node
        table = e.args[0]
        if opname(e) != "embedding" or not isinstance(table, fx.Node):
            raise SiteRefusedError(
                "the embedding is no table of tokens",
                where=place(site),
                found=f"{e.name} = {opname(e)}",
                expected="a look-up of token ids in a table (V, C), which soft embeddings are sums of",
                do='select the table: sites="embedding[0]"',
            )
        soft = condition(self.soft, edit.program, value).node
        sizes, wanted = map(on_example, shape(soft)), map(on_example, shape(e))
        if len(shape(e)) != 3 or list(sizes) != list(wanted):
            raise SiteRefusedError(
                "the soft embeddings do not belong to the tokens",
                where=place(site),
                found=f"{self.soft} ({described_shape(soft)}), embeddings ({described_shape(e)})",
                expected="an input (B, N, C) with a row for each token; zeros where none was predicted",
                do="gatecc.train.Thinking(model) has one",
            )
        channels = int(shape(e)[-1])
        edit.pin(soft, 2)
        s = edit.call(remembered, soft, table, *self.until, name="remembered")
        path = edit.module("thinking", lambda: beside(HybridGate(channels, self.start), edit))
        edit.replace(e, edit.call(path, e, s, name="hybrid"))
