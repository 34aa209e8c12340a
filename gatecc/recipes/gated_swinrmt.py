"""Gated-SwinRMT: retention with Manhattan decay in shifted windows, and the gate G1."""

from __future__ import annotations

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.init import Random
from gatecc.ir.rewrite import Rewrite
from gatecc.passes.gate import Gate
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.manhattan import Manhattan
from gatecc.recipes import samples
from gatecc.recipes.linearize import chosen
from gatecc.recipes.registry import Case, recipe
from gatecc.recipes.windowed_retention import g1


@recipe(
    "gated-swinrmt",
    citation="Gated-SwinRMT (a reading of its abstract); Manhattan decay as in RMT: Retentive Networks Meet Vision "
    "Transformers (2024)",
    cases=[Case(samples.windows, ("cost", "gradient", "reversible"))],
)
def gated_swinrmt(
    sites: str = "attention[...]",
    keep: str = "",
    form: str = "retention",
    split: bool = True,
    local: int = 5,
    initial: float = 2.0,
    spread: float = 4.0,
    init: str = "identity",
) -> tuple[Rewrite, ...]:
    """Retention in the windows of a Swin model: weights that decay with the Manhattan distance, then the gate G1.

    Along the rows of a window, then along its columns (``split``): softmax(q·k + |i - j| log gamma_h), gamma_h = 1 -
    2^-(``initial`` + ``spread`` h / H), a depthwise convolution of the values of ``local`` x ``local`` places, zero at
    first, and the gate. ``form="swat"``: sigmoid(q·k + ALiBi) gamma_h^|i - j| on values v * swish(W x), no convolution.
    Masks of shifted windows stay. The learned position biases of the scores take part no more; their parameters stay
    in the state dict. The weights of q, k, v and the output projection are the model's: heal it afterwards.
    """
    where = chosen(sites, keep)
    if form == "retention":
        return Mix(where, Manhattan("softmax", split, local, initial, spread)), g1(where, init)
    if form != "swat":
        raise ArgumentError("unknown form", found=repr(form), expected="retention or swat", do="pass one of them")
    swish = GateSpec("hidden", "linear(bias=False)", "element", "silu", init=Random())
    mixer = Manhattan("sigmoid", split, 0, initial, spread)
    return Gate(where.v, swish, label="swish"), Mix(where, mixer), g1(where, init)
