"""Sites: the typed places of a graph that a rewrite can name, and refusals: places that look like one but are not.

A matcher answers with a site or with a refusal, never with silence. A site holds its values (graph nodes with axes
that are named by what they count, gatecc.ir.axes), its weights (with orientation) and its place in the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.axes import Axes
from gatecc.ir.mask import Mask
from gatecc.ir.select import STAGES, Selector, Stages, Where


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of a site: the node that holds it and what its axes mean, e.g. ``Value(node, "bhnd")``."""

    node: fx.Node
    axes: Axes

    def __init__(self, node: fx.Node, axes: Axes | str) -> None:
        object.__setattr__(self, "node", node)
        object.__setattr__(self, "axes", Axes.of(axes))


@dataclass(frozen=True, eq=False)
class Masking(Value):
    """A value that meets the scores of attention: True where a key is "seen" or "hidden", or "added" or "subtracted"
    (an added boolean is True where a key is seen). ``rank``: how many axes the scores have there, with heads as an axis
    of their own or merged with the batch. ``inside``: it is a summand of another such value."""

    how: Literal["seen", "hidden", "added", "subtracted"]
    rank: int
    inside: bool

    def __init__(
        self,
        node: fx.Node,
        axes: Axes | str,
        how: Literal["seen", "hidden", "added", "subtracted"],
        rank: int = 4,
        inside: bool = False,
    ) -> None:
        super().__init__(node, axes)
        for name, value in (("how", how), ("rank", rank), ("inside", inside)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Weight:
    """A weight matrix of a site. ``orientation`` says which axis is the output: Linear is "out_in", Conv1D "in_out".

    ``rows`` is the range of output features that belong to this role when several roles share one matrix (fused qkv).
    """

    fqn: str
    orientation: Literal["out_in", "in_out", "conv"]
    bias: str | None = None
    rows: tuple[int, int] | None = None


class NoSuchNameError(SiteRefusedError, KeyError):
    """A rewrite reads a value or a weight that a site does not have; a KeyError too, as of any mapping."""

    __str__ = SiteRefusedError.__str__


class _Named(dict[str, Any]):
    """Values or weights by name; a name that is not there is answered with those that are."""

    what = where = ""

    def __missing__(self, name: str) -> Any:
        near = difflib.get_close_matches(str(name), self, n=1)
        raise NoSuchNameError(
            f"{self.what} {name!r}",
            where=self.where,
            found=f"it has {', '.join(self) or 'none'}",
            do=f"did you mean {near[0]!r}?"
            if near
            else "read one that it has, or name it in reads() of the rewrite, so that sites without it are left out",
        )


class _Kind(type):
    """``Attention["model.layers.*"]``, ``Attention[2:]``, ``Attention[...]``, ``Attention[predicate]``; a stage of all
    sites is an attribute, as in ``Model.logits``, where the class has none of this name (``Attention[...].heads``).

    On the metaclass, because type checkers read ``__class_getitem__`` as type arguments.
    """

    def __getattr__(cls, name: str) -> Selector:
        fields = any(name in vars(base).get("__annotations__", ()) for base in cls.__mro__)
        if name.startswith("_") or fields or "kind" not in vars(cls):
            raise AttributeError(f"{cls.__name__} has no attribute {name!r}")
        return getattr(cls[...], name)

    def __getitem__(cls, where: Where) -> Selector:
        return Selector(vars(cls)["kind"], where)


KINDS: dict[str, type[Site]] = {}  # by the name of the kind


@dataclass(frozen=True, eq=False, kw_only=True)
class Site(metaclass=_Kind):
    """A place in a graph. ``key`` is unique within a model: owner, ordinal, and the call if the owner runs
    repeatedly."""

    kind: ClassVar[str] = "site"
    stages: ClassVar[tuple[str, ...]] = ()  # the value names that this kind can expose
    main_stage: ClassVar[str] = "out"  # what a rewrite means when it names no stage
    numbered: ClassVar[tuple[str, ...]] = ()  # names of which there may be several: in0, in1, ...
    named: ClassVar[bool] = False  # other stages have names that the model gives
    is_part: ClassVar[bool] = True  # of a model, which may be selected in the place of another part

    owner: str
    ordinal: int = 0
    call: int = 0
    line: str = ""
    values: Mapping[str, Value]
    weights: Mapping[str, Weight] = field(default_factory=dict[str, Weight])

    def __init_subclass__(cls) -> None:
        """A kind of site can be selected as soon as its class exists."""
        super().__init_subclass__()
        KINDS[cls.kind] = cls
        STAGES[cls.kind] = Stages(cls.stages, cls.main_stage, cls.numbered, cls.named, cls.is_part)

    def __post_init__(self) -> None:
        where = f"{self.owner} {self.line}".strip()
        for what in ("value", "weight"):
            named = _Named(getattr(self, f"{what}s"))
            named.what, named.where = f"the {self.kind} site has no {what}", where
            object.__setattr__(self, f"{what}s", named)

    @property
    def key(self) -> str:
        """For example ``model.layers.0.self_attn#0`` (``@1`` appended for the second call of a shared module)."""
        return f"{self.owner}#{self.ordinal}" + (f"@{self.call}" if self.call else "")

    def absence(self, name: str) -> tuple[str, str]:
        """Why the site has no value of this name, and what to do."""
        return (
            f"this {self.kind} is spelled so that it has {', '.join(self.values)}",
            "gate or read another stage of it",
        )

    def find(self, name: str) -> Value | None:
        """A value by its name, None if the site has none. ``hidden_kv`` is ``hidden`` in self-attention."""
        return self.values.get(name) or (self.values.get("hidden") if name == "hidden_kv" else None)


@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(Site):
    """Softmax attention, one fused node or spelled out.

    Values (those that exist): hidden (b, n, c) what the query projection reads; hidden_kv likewise for keys; q, k, v
    after the head split and any rotary embedding (b, h, n, d); q_raw and k_raw before the rotary embedding (q and k
    themselves where there is none); q_linear and k_linear (b, n, c) as a projection of their own yields them, before
    the split and any norm; mask and bias: what hides keys and what is learned and added to the scores, over
    (b or 1, h or 1, n, m) or their last axes (of several the last; mask0, mask1, ... those before it); scores before
    softmax and weights after it (b, h, n, m), only when spelled out; heads = weights @ v (b, h, n, d); out = after the
    output projection (b, n, c).
    Weights: q, k, v, o; qkv instead where the rows of the three are interleaved in one matrix.

    Where channels attend to channels (XCiT, DaViT: ``over``), the axes are still named by what they count: q and heads
    (b, h, d, n), k and v (b, h, c, n), scores and weights (b, h, d, c).
    """

    kind = "attention"
    stages = tuple("hidden hidden_kv q_linear k_linear q_raw k_raw q k v mask bias scores weights heads out".split())
    main_stage = "heads"
    numbered = ("mask", "bias")

    spelling: Literal["sdpa", "softmax", "manual"]
    core: fx.Node  # the fused node, or the matmul that yields heads
    heads: int  # query heads, 0 if a merged axis hides the number
    kv_heads: int  # heads of k and v before any expansion
    scale: float | None  # what q @ k is multiplied by; None if it is not a constant
    soft_cap: float | None = None  # scores go through soft_cap * tanh(scores / soft_cap)
    sinks: bool = False  # the softmax sees a further logit that belongs to no key
    mask: Mask
    mask_whole: bool = True  # nothing but the maskings hides keys
    dropout: float = 0.0
    rotary: bool = False
    cross: bool = False  # keys come from another sequence than queries
    over: Literal["tokens", "channels"] = "tokens"  # what attends to what

    @property
    def maskings(self) -> tuple[Masking, ...]:
        """All values that meet the scores, in order."""
        return tuple(v for v in self.values.values() if isinstance(v, Masking) and not v.inside)

    def absence(self, name: str) -> tuple[str, str]:
        if self.spelling == "sdpa" and name in ("scores", "weights"):
            return (
                f"one fused operator computes the attention, so that its {name} are no value of the graph",
                'spell it out: attn_implementation="eager" in transformers, fused_attn=False in timm',
            )
        if name in ("mask", "bias"):
            return f"no tensor of this kind meets the scores; the mask is {self.mask}", "read another stage of it"
        return super().absence(name)


@dataclass(frozen=True, eq=False, kw_only=True)
class MLP(Site):
    """A feed-forward network. Values: in (b, n, c), hidden = input of the down projection, out (b, n, c).

    Weights: up, down, and gate for gated forms; gate_up when both share one matrix; conv FFNs have "conv" orientation.

    A mixture of experts is one too (form "experts"), of flattened tokens: in and out (b, c), hidden has a row for each
    choice of a token. It has the values of its router as well: router (b, e), the logits of all experts; weights and
    indices (b, e) of those that were chosen; and the weights of all experts, stacked (e, out, in), and router.
    """

    kind = "mlp"
    stages = ("in", "hidden", "out", "router", "weights", "indices")
    form: Literal["plain", "gated", "experts"]
    activation: str = ""  # name of the aten operator, e.g. "silu"
    experts: int = 0  # how many there are, of form "experts"
    chosen: int = 0  # how many of them a token takes; 0 if that is not known

    def absence(self, name: str) -> tuple[str, str]:
        if name in ("router", "weights", "indices") and self.form != "experts":
            return "the MLP is a dense one, which nothing routes", "select the layers that have experts"
        return super().absence(name)


@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Site):
    """One matrix product with a weight. Values: in, out. Weights: weight."""

    kind = "linear"
    stages = ("in", "out")


@dataclass(frozen=True, eq=False, kw_only=True)
class Conv(Site):
    """One convolution. Values: in, out (b, c, y, x) or (b, c, n). Weights: weight."""

    kind = "conv"
    stages = ("in", "out")


@dataclass(frozen=True, eq=False, kw_only=True)
class RNN(Site):
    """An RNN, GRU or LSTM over a sequence. Values: in (b, n, c), out (b, n, c) if the model reads it, or (n, b, c)."""

    kind = "rnn"
    stages = ("in", "out")
    core: fx.Node  # the operator; its results are out and the last states
    cell: str  # rnn, gru or lstm
    layers: int
    bidirectional: bool
    states: tuple[fx.Node, ...]  # what it starts from
    parameters: tuple[str, ...]  # its weights, relative to the program's module
    last: tuple[fx.Node | None, ...]  # last hidden and cell state, where the model reads them


@dataclass(frozen=True, eq=False, kw_only=True)
class Activation(Site):
    """One nonlinearity. Values: in, out."""

    kind = "activation"
    stages = ("in", "out")
    function: str = ""  # name of the aten operator, e.g. "gelu"


@dataclass(frozen=True, eq=False, kw_only=True)
class Residual(Site):
    """One residual join ``skip + branch``. Values: skip, branch, out. The owner is the module that adds."""

    kind = "residual"
    stages = ("skip", "branch", "out")
    main_stage = "branch"
    add: fx.Node


@dataclass(frozen=True, eq=False, kw_only=True)
class Merge(Site):
    """A join of two or more computed values that is no residual: add or cat. Values: in0, in1, ..., out."""

    kind = "merge"
    stages = ("out",)
    numbered = ("in",)
    form: Literal["add", "cat"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Embedding(Site):
    """A table look-up or patch embedding that starts the stream. Values: in, out. Weights: weight."""

    kind = "embedding"
    stages = ("in", "out")


@dataclass(frozen=True, eq=False, kw_only=True)
class Head(Site):
    """The projection that yields an output of the model. Values: in, out. Weights: weight."""

    kind = "head"
    stages = ("in", "out")


@dataclass(frozen=True, eq=False, kw_only=True)
class Block(Site):
    """A repeated unit that maps the stream to itself. Values: in, out (same shape)."""

    kind = "block"
    stages = ("in", "out")


@dataclass(frozen=True, eq=False, kw_only=True)
class Model(Site):
    """The model as a whole. Values: its inputs and outputs by name (``Model.logits``); out is the first output."""

    kind = "model"
    stages = ("out",)
    named = True
    is_part = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(Site):
    """One step of a model that runs again and again. Values: time, an input with a number per sample (a timestep), or
    position, one with a number per token; out, the first output of the step."""

    kind = "step"
    stages = ("time", "position", "out")
    is_part = False


@dataclass(frozen=True)
class Refusal:
    """A place that looks like a site but was not taken, and why.

    ``line`` is the source line; ``reason`` one sentence about what was found; ``remedy`` what the user can do.
    Codes: GCC1xx, one per cause, listed in ``gatecc.ir.refusals``.
    """

    code: str
    kind: str
    owner: str
    line: str
    reason: str
    remedy: str
