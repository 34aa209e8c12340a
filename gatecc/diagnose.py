"""diagnose: what attention and its replacements do inside a model, before and after a rewrite. Nothing is changed.

Each function captures the model as `inspect` does (rewritten layers with their rewrites), runs the graphs once on the
example inputs and reads the values of sites: massive activations, attention sinks, and how fast a linear state forgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from gatecc.capture.shield import shielded
from gatecc.capture.signature import split_inputs
from gatecc.engine.analyse import Analysis, Inputs, analyse, check_model, evaluation
from gatecc.engine.duplicates import Duplicates as Duplicates
from gatecc.engine.duplicates import duplicates as duplicates
from gatecc.engine.whole import whole_program
from gatecc.errors import ArgumentError
from gatecc.ir.ops import argument
from gatecc.ir.program import Program, attribute
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Attention, Residual, Site
from gatecc.ops.linear_attention import gates
from gatecc.pipeline import prepare
from gatecc.scope.hooks import UNSEEN
from gatecc.scope.state import scopes


@dataclass(frozen=True)
class Massive:
    """The largest activation of a site's value. ``massive``: above 100 and above 1000 medians (Sun et al., 2024)."""

    site: str
    largest: float
    median: float
    where: tuple[int, ...]  # its index in the value
    massive: bool

    @property
    def ratio(self) -> float:
        """How many medians it is."""
        return self.largest / self.median if self.median else math.inf


@dataclass(frozen=True)
class Sink:
    """The weight that queries give to the first key, mean over queries that see others too: of each head, and of
    all."""

    site: str
    heads: tuple[float, ...]

    @property
    def score(self) -> float:
        """The mean over heads."""
        return sum(self.heads) / len(self.heads)


@dataclass(frozen=True)
class Decay:
    """How fast a linear state forgets. ``half_life``: tokens after which half is left, quantiles over channels.

    A channel whose mean half-life is below one token keeps nothing (``forgets``); one whose half-life is longer than
    the sequence hardly decays (``keeps``): the fractions of such channels. With one of them at 1 the layer is at an end
    of its range: all tokens converge to nothing, or all add up (Token dynamics of Mamba, 2024).
    """

    site: str
    half_life: tuple[float, float, float]  # 10 %, 50 %, 90 %
    forgets: float
    keeps: float


@shielded
def massive(model: nn.Module, example_inputs: Inputs, sites: Selector | None = None) -> list[Massive]:
    """The largest activation of each site's value, by default of the stream after each residual join.

    Raises ExampleInputsError, UnsupportedModelError, CaptureError, EmptySelectionError.
    """
    selector = Residual[...].out if sites is None else sites
    return _read(model, example_inputs, selector, lambda site, values: _massive(site, selector, values))


@shielded
def sinks(model: nn.Module, example_inputs: Inputs, sites: Selector | None = None) -> list[Sink]:
    """The sink score of each softmax attention. Raises as `massive` does."""
    selector = Attention[...] if sites is None else sites
    if selector.kind != "attention":
        raise ArgumentError("a sink score is of attention", found=str(selector), expected="Attention[...]")
    return _read(model, example_inputs, selector, _sink)


@shielded
def decay(model: nn.Module, example_inputs: Inputs) -> list[Decay]:
    """The forgetting of every call of ``gatecc::linear_attention`` with a decay; the list is empty if none runs.

    The model runs twice as it is. A call belongs to the innermost module, or rewritten layer, that runs.

    Raises ExampleInputsError, UnsupportedModelError.
    """
    args, kwargs = split_inputs(example_inputs)
    check_model(model)
    watch = _Watch({id(m): name for name, m in model.named_modules()})
    with evaluation(model), torch.no_grad():
        model(*args, **kwargs)  # so that no rewritten layer captures this kind of call while it is watched
        with watch:
            model(*args, **kwargs)
    return watch.found


def decay_of(log_decay: Tensor, site: str = "", length: int | None = None) -> Decay:
    """The forgetting that log decays (B, H, N, D), all <= 0, mean. Raises ArgumentError for positive ones."""
    if bool((log_decay > 0).any()) or bool(log_decay.isnan().any()):
        raise ArgumentError("a log decay is not positive", where=site, found=f"max {float(log_decay.max()):.3g}")
    channels = log_decay.detach().double().abs().movedim((1, 3), (0, 1)).flatten(2).mean(-1)
    half = (math.log(2) / channels).flatten()  # inf where nothing decays, 0 where everything is forgotten at once
    low, middle, high = (float(half.quantile(q, interpolation="lower")) for q in (0.1, 0.5, 0.9))
    tokens = log_decay.shape[2] if length is None else length
    fractions = (float((half < 1).double().mean()), float((half > tokens).double().mean()))
    return Decay(site, (low, middle, high), *fractions)


@dataclass(frozen=True)
class Growth:
    """f(t) = amplitude·e^(-fall·x)·log(x) + level with x = rate·t + start: how a massive activation grows in training
    (Hidden Dynamics of Massive Activations, 2025)."""

    amplitude: float
    fall: float
    rate: float
    start: float
    level: float
    r2: float

    def __call__(self, t: float) -> float:
        x = self.rate * t + self.start
        return self.amplitude * math.exp(-self.fall * x) * math.log(x) + self.level


def fit_growth(steps: Sequence[float], values: Sequence[float]) -> Growth:
    """The five parameters of `Growth` that fit ratios recorded in training best (least squares), and their R².

    Amplitude and level are linear in the values and solved for; the other three are searched on a grid that is
    narrowed around its best point. Raises ArgumentError for fewer than six points.
    """
    if len(steps) != len(values) or len(steps) < 6:
        raise ArgumentError(
            "too few points for five parameters", found=f"{len(steps)} and {len(values)}", expected=">= 6"
        )
    t = torch.tensor(steps, dtype=torch.float64)
    y = torch.tensor(values, dtype=torch.float64)
    span = float(t.max().clamp_min(1e-12))
    centre = torch.tensor([-1.5, math.log10(10 / span), 0.15], dtype=torch.float64)  # log10 of fall, rate, start
    width = torch.tensor([2.5, 2.5, 0.15], dtype=torch.float64)
    best, solved = _search(t, y, centre, width)
    for _ in range(24):
        width = width * 0.6
        best, solved = _search(t, y, best, width)
    fall, rate, start = (10**best).tolist()
    residual = float(solved[2])
    total = float((y - y.mean()).square().sum())
    r2 = 1 - residual / total if total else 1.0
    return Growth(float(solved[0]), fall, rate, start, float(solved[1]), r2)


def _search(t: Tensor, y: Tensor, centre: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """The best of 11³ points around a centre (log10 of fall, rate, start) and its (amplitude, level, residual)."""
    ticks = torch.linspace(-1, 1, 11, dtype=torch.float64)
    grid = centre + width * torch.cartesian_prod(ticks, ticks, ticks)
    grid[:, 2].clamp_(min=1e-6)  # log(x) >= 0 from the first step on
    fall, rate, start = (10 ** grid[:, i : i + 1] for i in range(3))
    x = rate * t + start
    shape = (-fall * x).exp() * x.log()
    mean = shape.mean(-1, keepdim=True)
    spread = (shape - mean).square().sum(-1).clamp_min(1e-30)
    amplitude = ((shape - mean) * (y - y.mean())).sum(-1) / spread
    level = y.mean() - amplitude * mean[:, 0]
    residual = (amplitude[:, None] * shape + level[:, None] - y).square().sum(-1).nan_to_num(torch.inf)
    i = int(residual.argmin())
    return grid[i], torch.stack((amplitude[i], level[i], residual[i]))


Values = dict[fx.Node, Any]


class _Recorder(fx.Interpreter):
    """Runs a program on its own module's live weights and copies the values of the wanted nodes as they are made."""

    def __init__(self, program: Program, wanted: set[fx.Node]) -> None:
        super().__init__(program.graph_module)
        self.program = program
        self.wanted = wanted
        self.values: Values = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value.detach().clone() if isinstance(value, Tensor) else value
        return value

    def fetch_attr(self, target: str) -> Any:
        constant = self.program.constants.get(target)
        if constant is not None:
            return constant
        try:
            return attribute(self.program.module, target)
        except AttributeError:
            return super().fetch_attr(target)


def _analysis(model: nn.Module, example_inputs: Inputs) -> Analysis:
    args, kwargs = split_inputs(example_inputs)
    check_model(model)
    with evaluation(model):
        if not list(scopes(model)):
            return analyse(model, args, kwargs)
        program = whole_program(model, args, kwargs)  # analyse leaves the rewrites out
        found = prepare(program, canonical=True)
        return Analysis([program], list(found.found), list(found.refusals))


def values_of(model: nn.Module, program: Program, wanted: set[fx.Node]) -> Values:
    """What some nodes of a model's program hold on the example inputs."""
    if not wanted:
        return {}
    recorder = _Recorder(program, wanted)
    with torch.no_grad(), evaluation(model):
        recorder.run(*(x.detach().clone() for x in program.example))
    return recorder.values


def _read(
    model: nn.Module, example_inputs: Inputs, selector: Selector, row: Callable[[Site, Values], Any]
) -> list[Any]:
    """One row a selected site, in execution order."""
    analysis = _analysis(model, example_inputs)
    chosen = select(selector, analysis.sites, analysis.refusals)
    values: Values = {}
    for program in analysis.programs:
        mine = [s for s in chosen if analysis.program_of(s) is program]
        wanted = {v.node for s in mine for v in s.values.values()}
        wanted |= {n for s in mine if isinstance(s, Attention) for n in s.core.all_input_nodes}
        values |= values_of(model, program, wanted)
    return [row(s, values) for s in chosen]


class _Watch(TorchDispatchMode):
    """Sees each call of the operator, and which module of the model runs it."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.running: list[str] = []
        self.count: dict[str, int] = {}
        self.found: list[Decay] = []

    def __enter__(self) -> _Watch:
        def entered(module: nn.Module, args: Any) -> None:
            self.running.append(self.names.get(id(module), ""))

        def left(*_: Any) -> None:
            self.running.pop()

        for hook in (entered, left):
            setattr(hook, UNSEEN, True)  # a scope runs the operator itself: what it holds need not be entered
        self.hooks = (
            register_module_forward_pre_hook(entered),
            register_module_forward_hook(left, always_call=True),
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        log_decay = options.get("log_decay", args[3] if len(args) > 3 else None)
        if func.name().startswith("gatecc::linear_attention") and isinstance(log_decay, Tensor):
            owner = self.running[-1] if self.running else ""
            log_decay = gates.log_decay(log_decay, options.get("gate_normalizer"))
            self.count[owner] = self.count.get(owner, -1) + 1
            self.found.append(decay_of(log_decay, f"{owner}#{self.count[owner]}", args[0].shape[2]))
        return func(*args, **options)


def _massive(site: Site, selector: Selector, values: Values) -> Massive:
    value = site.find(selector.stage)
    if value is None:
        raise ArgumentError("the site has no such value", where=site.key, found=selector.stage)
    size = values[value.node].detach().abs().float()
    largest, median = float(size.max()), float(size.median())
    where = tuple(int(i) for i in torch.unravel_index(size.argmax(), size.shape))
    return Massive(site.key, largest, median, where, largest > 100 and largest > 1000 * median)


def _sink(site: Site, values: Values) -> Sink:
    assert isinstance(site, Attention)
    weights = _weights(site, values)
    others = weights[..., 1:].sum(-1) > 0  # the first query of a causal model has no choice
    mean = (weights[..., 0] * others).sum((0, 2)) / others.sum((0, 2)).clamp_min(1)
    return Sink(site.key, tuple(mean.tolist()))


def _weights(site: Attention, values: Values) -> Tensor:
    """The attention weights, (B, H, N, M)."""
    spelled = site.find("weights")
    if spelled is not None and spelled.axes == "bhnm":
        return values[spelled.node].float()
    if site.spelling != "sdpa":
        raise ArgumentError(
            "the weights of this attention have other axes",
            where=site.key,
            found="" if spelled is None else str(spelled.axes),
        )
    core = site.core

    def given(position: int, name: str, default: Any = None) -> Any:
        value = argument(core, position, name, default)
        return values[value] if isinstance(value, fx.Node) else value

    q, k = (given(i, n).float() for i, n in enumerate(("query", "key")))
    mask, causal, scale = given(3, "attn_mask"), given(5, "is_causal", False), given(6, "scale")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.float()
    return scores.softmax(-1).nan_to_num(0)
