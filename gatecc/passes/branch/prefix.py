"""Prefix: learned or projected keys and values that every query of an attention sees, before those of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.ops import named
from gatecc.ir.program import shape
from gatecc.ir.site import Attention, Site, Value
from gatecc.passes.axes import arranged
from gatecc.passes.branch.body import Body
from gatecc.passes.operands import beside, condition, place, stage, static_sizes

Residual: TypeAlias = Literal["none", "tanh", "sigmoid", "gelu"]
ACTIVATIONS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": nn.functional.gelu}


@dataclass(frozen=True)
class Prefix(Body, tag="prefix"):
    """Attention of the site's queries to ``tokens`` further keys and values, which come before those of the tokens.

    ``softmax="joint"``: one softmax over the prefix and the tokens (prefix tuning, Li & Liang, 2021). The result takes
    the place of the heads: ``op="lerp"``, where a gate that starts at 0 keeps the model as it was; without a gate the
    function changes at once, since the prefix takes its share of the softmax. The masks of the tokens stay as they are,
    and hide nothing of the prefix. The scores are computed as a tensor, no fused kernel takes them, and a call with a
    cache object is refused; `gatecc.decoder` and ``generate`` keep a state.

    ``softmax="apart"``: a softmax over the prefix alone, which is added: ``op="add"``, and a gate that starts at 0
    (LLaMA-Adapter, 2023). The attention itself stays fused.

    The keys and values are learned, (heads, P, width), for each key head. With ``condition``, an input of the model
    with a vector for each sample, they are a projection of it (IP-Adapter, 2023). No position is added to keys of a
    prefix: behind rotary embeddings a query scores them as it is, rotated; the positions of the tokens stay.

    ``residual``: the scores s of the prefix become s + t2 act(t1 s), with two learned numbers that start at 1 (NoRGa,
    2024); those of the tokens stay.
    """

    tokens: int = 16
    softmax: Literal["joint", "apart"] = "joint"
    condition: str | None = None
    residual: Residual = "none"

    def check(self) -> None:
        self.require(self.tokens > 0, "tokens", "a positive integer")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q",)

    @property
    def effects(self) -> Effects:
        return Effects(
            same_for_layers=True, whole_model=self.condition is not None, loses_cache=self.softmax == "joint"
        )

    @property
    def ops(self) -> tuple[str, ...]:
        return ("lerp",) if self.softmax == "joint" else ("add",)

    def notes(self, site: Site, value: Value) -> Iterable[str]:
        if isinstance(site, Attention) and site.rotary:
            yield f"{site.key}: the keys of the prefix have no position, the queries that score them are rotated"

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        if not isinstance(site, Attention) or site.over != "tokens" or site.scale is None:
            raise _refused(site, "no attention between tokens with a constant scale")
        q = stage(site, "q")
        if self.softmax == "joint" and site.spelling == "sdpa":  # its operands have the axes of its result
            q = Value(_operand(site, "query"), value.axes)
        keys, values = self._made(site, q, value, edit)
        lead = "".join(letter for letter in q.axes if letter not in "hnd")
        have, want = q.axes.text, value.axes.text
        changed = () if self.residual == "none" else (self._gate(edit),)
        given = (q.node, keys, values, have, f"{lead}hnd", site.scale, site.soft_cap)
        if self.softmax == "apart":
            return edit.call(apart, *given, want, self.residual, *changed, name="prefix")
        if site.sinks:
            raise _refused(site, "a softmax that sees a sink", "use softmax='apart'")
        if site.spelling != "sdpa":
            own = stage(site, "scores")
            if own.axes.text != f"{lead}hnm":
                raise _refused(site, f"scores with the axes {own.axes}, queries with {q.axes}")
            return edit.call(joined, *given, want, own.node, value.node, self.residual, *changed, name="prefix")
        if have != f"{lead}hnd":
            raise _refused(site, f"queries with the axes {q.axes}")
        operands = [_operand(site, name) for name in ("query", "key", "value")]
        options = [named(site.core, name, None) for name in ("attn_mask", "dropout_p", "is_causal", "scale")]
        return edit.call(joint, *operands, keys, values, *options, self.residual, *changed, name="prefix")

    def _gate(self, edit: Editor) -> fx.Node:
        """The two numbers of the residual."""
        return edit.parameter(f"{edit.module('prefix_gate', lambda: beside(Gains(), edit))}.gains")

    def _made(self, site: Attention, q: Value, value: Value, edit: Editor) -> tuple[fx.Node, fx.Node]:
        """The nodes of keys and values, one for each query head."""
        sizes, width = static_sizes(q), static_sizes(value).get("d")
        heads, wide = sizes.get("h"), sizes.get("d")
        if "g" in q.axes or not heads or not wide or not width or value.axes[-1] != "d":
            raise _refused(site, f"queries with the axes {q.axes}, heads with {value.axes}")
        groups = site.kv_heads if site.kv_heads and heads % site.kv_heads == 0 else heads
        shapes = (groups, self.tokens, wide, width, heads // groups)
        if self.condition is None:
            path = edit.module("prefix", lambda: beside(Learned(*shapes), edit))
            return edit.call(path, q.node, name="prefix")
        given = condition(self.condition, edit.program, value)
        if given.axes != "bc" or sorted(q.axes) != sorted("bhnd"):
            found = f"the input {self.condition} with the axes {given.axes}, queries with {q.axes}"
            raise _refused(site, found, "give one vector per sample")
        channels = int(shape(given.node)[-1])
        path = edit.module("prefix", lambda: beside(Projected(channels, *shapes), edit))
        return edit.call(path, given.node, name="prefix")


class Gains(nn.Module):
    """The two numbers t1 and t2 of a residual of scores, 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.ones(2))


def _operand(site: Attention, name: str) -> fx.Node:
    found = named(site.core, name)
    assert isinstance(found, fx.Node)
    return found


def _refused(site: Site, found: str, do: str = "leave this site out") -> SiteRefusedError:
    return SiteRefusedError(
        "a prefix of keys and values does not fit here",
        where=place(site),
        found=found,
        expected="attention between tokens, with heads as an axis of their own",
        do=do,
    )


class Learned(nn.Module):
    """The keys (G, P, D) and values (G, P, V) of `Prefix`, G key heads. -> the same for each of the query heads."""

    def __init__(self, groups: int, tokens: int, wide: int, width: int, repeat: int) -> None:
        super().__init__()
        self.repeat = repeat
        self.keys = nn.Parameter(torch.empty(groups, tokens, wide).normal_())
        self.values = nn.Parameter(torch.empty(groups, tokens, width).normal_(0.0, 0.02))

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        return _repeated(self.keys.to(q.dtype), self.repeat), _repeated(self.values.to(q.dtype), self.repeat)


class Projected(nn.Module):
    """Keys and values that are projections of a vector per sample. c: (B, C) -> (B, H, P, D), (B, H, P, V)."""

    def __init__(self, channels: int, groups: int, tokens: int, wide: int, width: int, repeat: int) -> None:
        super().__init__()
        self.groups, self.tokens, self.repeat = groups, tokens, repeat
        self.keys = nn.Linear(channels, groups * tokens * wide)
        self.values = nn.Linear(channels, groups * tokens * width)

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (
            project(c.to(project.weight.dtype)).unflatten(-1, (self.groups, self.tokens, -1))
            for project in (self.keys, self.values)
        )
        return _repeated(keys, self.repeat), _repeated(values, self.repeat)


def _repeated(x: Tensor, repeat: int) -> Tensor:
    """One for each query head: (..., G, P, D) -> (..., H, P, D)."""
    return x if repeat == 1 else x.repeat_interleave(repeat, -3)


def prefix_scores(
    q: Tensor, keys: Tensor, scale: float, cap: float | None, residual: Residual = "none", gains: Tensor | None = None
) -> Tensor:
    """The scores of a prefix in float32, (..., H, N, P). q: (..., H, N, D), keys: (B or none, H, P, D), gains: (2,)."""
    s = (q @ keys.transpose(-2, -1)).float() * scale
    s = s if cap is None else cap * torch.tanh(s / cap)
    if gains is None:
        return s
    inner, outer = gains.float().unbind()
    return s + outer * ACTIVATIONS[residual](inner * s)


def apart(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    have: str,
    order: str,
    scale: float,
    cap: float | None,
    want: str,
    residual: Residual = "none",
    gains: Tensor | None = None,
) -> Tensor:
    """softmax(q keys') values over the prefix alone, in the axes of the heads: ``want``."""
    s = prefix_scores(arranged(q, have, order), keys, scale, cap, residual, gains)
    return arranged(torch.softmax(s, -1).to(values.dtype) @ values, order, want)


def joined(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    have: str,
    order: str,
    scale: float,
    cap: float | None,
    want: str,
    own: Tensor,
    heads: Tensor,
    residual: Residual = "none",
    gains: Tensor | None = None,
) -> Tensor:
    """The joint softmax, from the scores of the tokens, ``own``: (..., H, N, M), and what they gave: the ``heads``.

    A softmax over two parts is the convex sum of the softmaxes over each, weighed by their shares of the exponentials.
    """
    s = prefix_scores(arranged(q, have, order), keys, scale, cap, residual, gains)
    share = torch.sigmoid(torch.logsumexp(s, -1, True) - torch.logsumexp(own.float(), -1, True))
    prefix = torch.softmax(s, -1).to(values.dtype) @ values
    prefix, share = arranged(prefix, order, want), arranged(share, order, want)
    return torch.lerp(heads, prefix.to(heads.dtype), share.to(heads.dtype))


def joint(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dropout: float | None,
    causal: bool | None,
    scale: float | None,
    residual: Residual = "none",
    gains: Tensor | None = None,
) -> Tensor:
    """What scaled_dot_product_attention gives with a prefix before keys and values that no mask hides.

    q: (..., H, N, D), k: (..., G, M, D), v: (..., G, M, V) -> (..., H, N, V).
    """
    factor = q.size(-1) ** -0.5 if scale is None else scale
    if q.dim() > 3 and q.size(-3) != k.size(-3):
        k, v = (x.repeat_interleave(q.size(-3) // k.size(-3), -3) for x in (k, v))
    own = q @ k.transpose(-2, -1) * factor
    if causal:
        at = torch.arange(q.size(-2), device=q.device).unsqueeze(-1)
        hidden = torch.arange(k.size(-2), device=q.device) > at
        own = own.masked_fill(hidden, float("-inf"))
    if mask is not None:
        own = own.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else own + mask
    s = prefix_scores(q, keys, factor, None, residual, gains)
    weights = torch.softmax(torch.cat([s, own.float()], -1), -1).to(v.dtype)
    if dropout:
        weights = torch.dropout(weights, dropout, True)
    size = s.size(-1)
    return weights[..., size:] @ v + weights[..., :size] @ values
