"""state_space: every causal token mixer of a model in one form, h_t = A_t h_(t-1) + B_t u_t, y_t = C_t h_t + D_t u_t.

`views` shows the sites of a model in this form, checked against what they compute. The forms by themselves: `linear`
(linear attention with and without decay, delta rules), `softmax`, `selective` (S6), `of_weights` (any causal mixer);
`gap` says how far two of them are from being the same layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from gatecc.capture.shield import shielded
from gatecc.capture.signature import map_tensors, split_inputs
from gatecc.diagnose import Values, values_of
from gatecc.engine.analyse import Inputs, check_model, evaluation
from gatecc.engine.whole import whole_edits
from gatecc.errors import ArgumentError
from gatecc.ir.edit import Call, Editor
from gatecc.ir.ops import argument
from gatecc.ir.program import Program, attribute
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Attention
from gatecc.ops.state_space import StateSpace, gap, linear, of_weights, selective, softmax
from gatecc.passes.mix.mixers.base import MixerModule

__all__ = ["StateSpace", "View", "gap", "linear", "of_weights", "selective", "softmax", "views"]


@dataclass(frozen=True)
class View:
    """An attention site as a recurrence. ``mixer`` is softmax, or what was put in its place.

    ``form`` is None where there is none, and ``refused`` says why: a site that looks ahead, a mixer that is no linear
    map of its values. ``error``: the largest difference of what the form and the site compute in float64, relative to
    max(1, the largest value).
    """

    site: str
    mixer: str
    form: StateSpace | None = None
    error: float = 0.0
    refused: str = ""

    def __str__(self) -> str:
        if self.form is None:
            return f"{self.site}: {self.mixer}, no state space: {self.refused}"
        return f"{self.site}: {self.mixer}, {self.form.transition} A, state {self.form.state}, error {self.error:.1e}"


@shielded
def views(model: nn.Module, example_inputs: Inputs, sites: Selector | None = None) -> list[View]:
    """Each attention site of a model, rewritten or not, as a recurrence on the example inputs.

    A copy of the model runs in float64; the model is not changed. Raises ExampleInputsError, UnsupportedModelError,
    CaptureError, EmptySelectionError, and ArgumentError for sites of another kind.
    """
    selector = Attention[...] if sites is None else sites
    if selector.kind != "attention":
        raise ArgumentError(
            "only attention has this form", found=str(selector), expected="Attention[...]", do="select attention"
        )
    check_model(model)
    wide = copy.deepcopy(model).double()
    args, kwargs = map_tensors(lambda x: x.double() if x.is_floating_point() else x, split_inputs(example_inputs))
    with evaluation(wide):
        prepared, editors = whole_edits(wide, args, kwargs)
    chosen = [s for s in select(selector, prepared.found, prepared.refusals) if isinstance(s, Attention)]
    mixed = {e.site.key: e for e in editors if _mixer_call(e) is not None}
    reads = [_mixed(mixed[s.key], prepared.program) if s.key in mixed else _softmax(s) for s in chosen]
    values = values_of(wide, prepared.program, {node for read in reads for node in read.nodes})
    return [read.view(site.key, values) for site, read in zip(chosen, reads, strict=True)]


@dataclass(frozen=True)
class _Read:
    """How a view is made of the values of some nodes: its form, and what the site computes, made comparable."""

    mixer: str
    nodes: list[fx.Node]
    form: Callable[[Values], StateSpace]
    pair: Callable[[StateSpace, Values], tuple[Tensor, Tensor]]

    def view(self, site: str, values: Values) -> View:
        with torch.no_grad():
            try:
                form = self.form(values)
            except ArgumentError as e:
                return View(site, self.mixer, refused=f"{e.args[0]}".splitlines()[0])
            got, wanted = (x.double() for x in self.pair(form, values))
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1))
        return View(site, self.mixer, form, error)


def _mixer_call(edit: Editor) -> Call | None:
    """The step in which a rewrite calls the module of a mixer."""
    for step in edit.steps:
        if isinstance(step, Call) and step.path and isinstance(_module(edit.program, step.path), MixerModule):
            return step
    return None


def _module(program: Program, path: str) -> object:
    return attribute(program.module, path)


def _mixed(edit: Editor, program: Program) -> _Read:
    call = _mixer_call(edit)
    assert call is not None
    module = _module(program, call.path or "")
    assert isinstance(module, MixerModule)
    nodes = [a for a in call.arguments if isinstance(a, fx.Node)]

    def form(values: Values) -> StateSpace:
        return module.state_space(*(values[n] for n in nodes))

    def pair(made: StateSpace, values: Values) -> tuple[Tensor, Tensor]:
        return module.finished(made.run()[0]), values[call.results[0]]

    return _Read(module.tag, [*nodes, call.results[0]], form, pair)


def _softmax(site: Attention) -> _Read:
    """From the weights where they are spelled out, else from what the fused operator reads."""
    weights, core = site.find("weights"), site.core
    heads, v = site.values["heads"], site.values["v"]
    nodes = [heads.node, v.node, *core.all_input_nodes, *([weights.node] if weights is not None else [])]

    def form(values: Values) -> StateSpace:
        if site.spelling == "sdpa":
            return of_weights(_fused_weights(core, values), values[_operand(core, 2)])
        if weights is None or (weights.axes, v.axes.renamed("m", "n")) != ("bhnm", "bhnd"):
            raise ArgumentError(
                "the weights or values of this attention have other axes",
                found=f"{weights.axes if weights else 'no weights'} and {v.axes}",
                expected="bhnm and bhnd",
                do="leave this site out",
            )
        return of_weights(values[weights.node], values[v.node])

    def pair(made: StateSpace, values: Values) -> tuple[Tensor, Tensor]:
        order = [heads.axes.index(a) for a in "bhnd"]
        return made.run()[0], values[heads.node].permute(order)

    return _Read("softmax", nodes, form, pair)


def _operand(core: fx.Node, position: int) -> fx.Node:
    node = core.args[position]
    assert isinstance(node, fx.Node)
    return node


def _fused_weights(core: fx.Node, values: Values) -> Tensor:
    """The weights of ``scaled_dot_product_attention``: (B, H, N, N)."""

    def given(position: int, name: str, default: Any = None) -> Any:
        value = argument(core, position, name, default)
        return values[value] if isinstance(value, fx.Node) else value

    q, k, mask, scale = given(0, "query"), given(1, "key"), given(3, "attn_mask"), given(6, "scale")
    k = k.repeat_interleave(q.size(1) // k.size(1), 1)
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)
    if given(5, "is_causal", False):
        scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0)
