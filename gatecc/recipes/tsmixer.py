"""TSMixer: feature gates, an MLP across series, and forecasts that are reconciled."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.branch.across import Across
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.reconcile import Reconcile
from gatecc.recipes import streams
from gatecc.recipes.feature_gate import feature_gate
from gatecc.recipes.registry import Case, recipe


@recipe(
    "tsmixer",
    citation="TSMixer: Lightweight MLP-Mixer Model for Multivariate Time Series Forecasting (2023)",
    cases=[Case(streams.forecasts, ("identity", "cost", "gradient", "export", "reversible"))],
)
def tsmixer(
    mlps: str = "mlp[...]",
    blocks: str = "block[...]",
    forecasts: str = "model[...].out",
    axis: str = "y",
    width: int = 0,
    context: int = 2,
) -> tuple[Rewrite, ...]:
    """A softmax gate after each MLP, an MLP across the series after each block, and reconciled forecasts.

    After each of ``mlps`` h <- h * d softmax(W h + b) over the d features (`feature-gate`). After each of ``blocks``
    x <- x + MLP(LN(x)) along the ``axis`` of the series (the hybrid channel of the paper, ``mode="mix_channel"`` of
    PatchTSMixer), with a gate of its own. The ``forecasts``, (B, time, series), are corrected by those of all series up
    to ``context`` steps before and after. Each part starts as exactly nothing, so a trained model with independent
    channels goes on from where it is; ``mlps=""``, ``blocks=""`` or ``forecasts=""`` leaves one out.

    Nothing is gated off: a softmax over features is never 0. There is no form that skips.
    """
    made: list[Rewrite] = list(feature_gate(mlps)) if mlps else []
    if blocks:
        made.append(Branch(Selector.parse(blocks).out, Across(axis, width), label="across_series"))  # pyright: ignore[reportArgumentType]
    if forecasts:
        made.append(Branch(Selector.parse(forecasts), Reconcile(context), label="reconcile"))
    return tuple(made)
