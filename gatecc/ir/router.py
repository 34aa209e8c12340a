"""Router: a gate over experts. Its spec names what it reads, how that is scored, and how experts are chosen.

``RouterSpec("in", "linear(bias=False)", "softmax_topk(2)")`` is the router of Mixtral. A spec is data, the same in
Python, JSON and text, as a `GateSpec` is. While a router trains it balances its experts and keeps figures of what it
did (`gatecc.ir.gates.balance`), which `gatecc.aux_losses` and `gatecc.routing` read.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule, GateShape, GateSpec, Ref
from gatecc.ir.gates import choices as choices  # all ways to choose, by name
from gatecc.ir.gates.balance import Balance, Capacity, LossFreeBias, Routed, counts, figures
from gatecc.ir.gates.choice import BIAS, Choice, Chosen, Decision
from gatecc.ir.gates.init import Init
from gatecc.ir.gates.layout import Features, align, spread
from gatecc.ir.gates.option import expression
from gatecc.ir.gates.scorer import Scorer
from gatecc.ir.gates.source import Source

_HEAD = 5  # of a router's figures, before the loads: the step, passes, tokens, entropy, dropped slots


@dataclass(frozen=True, init=False)
class RouterSpec:
    """source × scorer × choice × init × balance.

    Each may be given as its object, its text or its JSON. ``source`` is what a gate may read: "in" (the input of an MLP
    or linear site), "cond(task)", "pool(in)", a tuple for a concatenation. ``mask`` names an input of the model, a mask
    over tokens (``attention_mask``): where it is 0 a token counts neither in losses and loads nor for a capacity.

    Raises ArgumentError for choices that do not go together, with what would.
    """

    source: Source
    scorer: Scorer
    choice: Choice
    init: Init
    balance: Balance
    mask: str

    def __init__(
        self,
        source: Source | str | tuple[Source | str, ...] | Mapping[str, Any] = "in",
        scorer: Scorer | str | Mapping[str, Any] = "linear(bias=False)",
        choice: Choice | str | Mapping[str, Any] = "softmax_topk(2)",
        init: Init | str | Mapping[str, Any] = "random(0.02)",
        balance: Balance | str | tuple[Balance | str, ...] | Mapping[str, Any] = "none",
        mask: str = "",
    ) -> None:
        options = Source.coerce(source), Scorer.coerce(scorer), Choice.coerce(choice), Init.coerce(init)
        for f, value in zip(fields(self), (*options, Balance.coerce(balance), mask), strict=True):
            object.__setattr__(self, f.name, value)
        if expected := next((e for part in self.balance.parts if (e := part.accepts(self.choice, self.trained))), ""):
            raise ArgumentError("this router cannot be balanced so", found=str(self), expected=expected)
        self.gate  # noqa: B018  # a gate checks that the choices go together

    @property
    def gate(self) -> GateSpec:
        """The gate that yields the logits."""
        return GateSpec(self.source, self.scorer, "expert", "linear", init=self.init)

    @property
    def trained(self) -> bool:
        """Whether gradients train the scorer."""
        return self.scorer.trained

    @property
    def mixes_tokens(self) -> bool:
        """Whether what a token gets may depend on later ones."""
        return self.choice.mixes_tokens or self.source.mixes_tokens or self.scorer.mixes_tokens

    @property
    def balances_by_bias(self) -> bool:
        """Whether loads move a bias between steps."""
        return any(isinstance(part, LossFreeBias) for part in self.balance.parts)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a report should say of it."""
        later = (
            f"{self.choice} of {self.source} lets a token see later ones: the model is not causal any more, so that "
            "calls with a KV cache and the decoder are refused"
        )
        moved = "expert_bias" if self.balances_by_bias else str(self.choice) if self.choice.moves else ""
        callback = (
            f"{moved} moves once per step of the optimizer: call gatecc.train.routing.step(model) after it, or give "
            "your trainer gatecc.train.trainer_callback() or lightning_callback(); heal does it by itself"
        )
        found = (self.choice.note, callback if moved else "", later if self.mixes_tokens else "")
        return tuple(note for note in found if note)

    @property
    def sources(self) -> tuple[Ref, ...]:
        """The values that the engine must find and hand to the router, in this order."""
        return self.source.refs

    def build(
        self,
        shape: GateShape,
        experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Router:
        """The router among so many experts for a place. Raises ArgumentError if k is larger."""
        return Router(self, shape, experts, device=device, dtype=dtype)

    # -- text and JSON -------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        rows = [*map(str, (self.source, self.scorer, self.choice)), f"init={self.init}"]
        rows += [f"balance={self.balance}"] if self.balance.tag != "none" else []
        return ", ".join([*rows, f"mask={self.mask}"] if self.mask else rows)

    @classmethod
    def parse(cls, text: str) -> RouterSpec:
        """The inverse of str: "in, linear(bias=False), softmax_topk(2)"."""
        node = expression(f"router({text})", "router")
        if not isinstance(node, ast.Call) or any(k.arg is None for k in node.keywords):
            raise ArgumentError("cannot read this router", found=repr(text), expected=cls.expected())
        args = [ast.unparse(a) for a in node.args]
        return cls._make(args, {str(k.arg): ast.unparse(k.value) for k in node.keywords})

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values."""
        return {f.name: getattr(self, f.name).to_json() for f in fields(self)[:-1]} | {"mask": self.mask}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RouterSpec:
        """The inverse of to_json; raises ArgumentError for unknown fields."""
        return cls._make([], data)

    @classmethod
    def coerce(cls, value: RouterSpec | str | Mapping[str, Any]) -> RouterSpec:
        """A spec from itself, its text or its JSON."""
        if isinstance(value, RouterSpec):
            return value
        return cls.parse(value) if isinstance(value, str) else cls.from_json(value)

    @classmethod
    def _make(cls, args: list[str], kwargs: Mapping[str, Any]) -> RouterSpec:
        try:
            return cls(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError("cannot read this router", found=str(error), expected=cls.expected()) from None

    @classmethod
    def expected(cls) -> str:
        """How a router is written."""
        return "source, scorer, choice, init=, balance=, mask="


class Router(GateModule):
    """``forward(value, *sources)`` -> weights (T, k) in float32 and indices (T, k); T counts the positions of value.

    With a mask in the spec its tensor comes after the sources. The parameters are those of the scorer, ``weight``
    (E, C) for a linear one; buffers are those of the choice and of balancing, in float32 whatever the model is cast to.
    In training `_FIGURES` and one loss per part are added up in buffers that are not saved.
    """

    def __init__(
        self,
        spec: RouterSpec,
        shape: GateShape,
        experts: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        choice = spec.choice
        self.slots = choice.slots(experts)
        sizes = {**shape.sizes, "e": choice.scores(experts)}
        super().__init__(spec.gate, replace(shape, sizes=sizes), device=device, dtype=dtype)
        self.router = spec
        self.experts = experts
        for name, value in choice.parameters(experts).items():
            self.register_parameter(name, nn.Parameter(value.to(device=device)))
        kept = {**choice.buffers(experts), **spec.balance.buffers(experts)}
        kept |= {"routing_step": torch.zeros((), dtype=torch.int64)} if choice.moves else {}
        self._state = (*choice.parameters(experts), *kept)
        self._losses = spec.balance.losses
        figures = {"routed": torch.zeros(_HEAD + 2 * experts), "routed_step": torch.zeros(())}
        figures |= {"loss_scale": torch.ones(())} if self._losses else {}
        figures |= {f"loss_{part.tag}": torch.zeros(3) for part in self._losses}
        for name, buffer in {**kept, **figures}.items():
            self.register_buffer(name, buffer.to(device=device), persistent=name in kept)

    # -- running -------------------------------------------------------------------------------------------------------

    def forward(self, value: Tensor, *given: Tensor | GateShape) -> Chosen:  # pyright: ignore[reportIncompatibleMethodOverride] - a router yields a choice where a gate yields a factor
        tensors = [x for x in given if isinstance(x, Tensor)]
        at = next((x for x in given if isinstance(x, GateShape)), self.shape)
        sources, masks = tensors[: len(self.spec.sources)], tensors[len(self.spec.sources) :]
        logits = self.logits(value, *sources, at)
        named = {name: getattr(self, name) for name in self._state}
        real = self._real(value, masks[0], at) if masks else None
        decision = self.router.choice.decide(logits, named, self.training, real)
        return self._balanced(logits, decision, real) if self.training else decision.chosen

    def logits(self, value: Tensor, *given: Tensor | GateShape) -> Tensor:
        """Scores (T, E) in float32: softmax and thresholds are decided there whatever the model computes in."""
        sources = [x for x in given if isinstance(x, Tensor)]
        at = next((x for x in given if isinstance(x, GateShape)), self.shape)
        scores = self.score(value, *sources, at=at)
        return _rows(scores, value, at).float()

    def _real(self, value: Tensor, mask: Tensor, at: GateShape) -> Tensor:
        """Which positions of the value are no padding: (T,) of bool."""
        positions = "bn"[: mask.dim()]
        return _rows(align(Features((mask != 0).unsqueeze(-1), positions), at, value), value, at).squeeze(-1)

    def _balanced(self, logits: Tensor, decision: Decision, real: Tensor | None) -> Chosen:
        """Add the losses to what is differentiated, keep the figures, and drop what exceeds a capacity."""
        asked, weight = decision.chosen, _real_weight(logits, real)
        for part in self.router.balance.parts:
            if isinstance(part, Capacity):
                decision = decision._replace(chosen=part.limited(decision.chosen, self.experts, weight))
        chosen = decision.chosen
        routed = Routed(logits[:, : self.experts], decision, counts(chosen.indices, self.experts), weight)
        weights = chosen.weights
        for part in self._losses:
            loss = part.loss(routed)
            weights = torch.ops.gatecc.add_loss(weights, loss, self.loss_scale)
            self._record(f"loss_{part.tag}", torch.stack((torch.ones_like(loss), loss)))
        self._record("routed", figures(routed, counts(asked.indices, self.experts)))
        return Chosen(weights, chosen.indices)

    def _record(self, name: str, values: Tensor) -> None:
        torch.ops.gatecc.record(getattr(self, name), values.detach(), self.routed_step)

    # -- between steps -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self, counts: Tensor | None = None) -> None:
        """Go on to the next step of the optimizer: schedules, biases, and figures that start anew.

        ``counts`` (E,): how often each expert was chosen in all processes; by default in this one.
        """
        for part in self.router.balance.parts:
            if isinstance(part, LossFreeBias):
                bias = self.get_buffer(BIAS)
                bias.copy_(part.moved(bias, self.counts if counts is None else counts))
        if self.router.choice.moves:
            step = self.get_buffer("routing_step").add_(1)
            self.router.choice.advance({name: getattr(self, name) for name in self._state}, int(step))
        self.get_buffer("routed_step").add_(1)

    @property
    def counts(self) -> Tensor:
        """How often each expert ran since the last step, (E,)."""
        return self.get_buffer("routed")[_HEAD : _HEAD + self.experts]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Buffers stay in their dtype: counts and biases in bfloat16 would stand still."""
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.router}; {self.experts} experts; {self.shape.axes}"


def _rows(x: Features, value: Tensor, at: GateShape) -> Tensor:
    """Features (*at, F) at each position of the value: (T, F)."""
    sizes = {a: value.size(at.axes.index(a)) for a in at.positions}
    return spread(x, at.positions, sizes).flatten(0, -2) if at.positions else x.x.reshape(1, -1)


def _real_weight(logits: Tensor, real: Tensor | None) -> Tensor:
    """(T, 1): 1, and 0 at padding."""
    return torch.ones_like(logits[:, :1]) if real is None else real.unsqueeze(-1).to(logits.dtype)


def is_router(module: object) -> bool:
    """Whether a module is a router."""
    return isinstance(cast("Any", module), Router)
