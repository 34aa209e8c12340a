"""PGN: parallel gated networks in the place of recurrent layers."""

from __future__ import annotations

from gatecc.errors import ArgumentError
from gatecc.ir.rewrite import Rewrite
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.pgn import PGN
from gatecc.recipes import samples
from gatecc.recipes.linearize import chosen
from gatecc.recipes.registry import Case, recipe


@recipe(
    "pgn",
    citation="PGN: The RNN's New Successor is Effective for Long-Range Time Series Forecasting (2024)",
    cases=[Case(samples.series, ("causality", "cost", "gradient", "state", "reversible"))],
)
def pgn(sites: str = "rnn[...]", keep: str = "", window: int = 16) -> tuple[Rewrite, ...]:
    """A parallel gated network in the place of each RNN, GRU or LSTM: a window of the past, and one gate.

    h_t is linear in the ``window`` inputs before token t, zeros before the first; a gate of x_t and h_t then chooses
    between h_t and tanh of a linear map of both. All tokens at once: nothing waits for the token before. The weights of
    the recurrent layer take part no more; they stay in the state dict. Layers in both directions, with an initial
    state, or whose cell state is read are refused. The published network reads all of a fixed length: ``window`` its
    length less one. Its time features are inputs like others.
    """
    return (Mix(chosen(sites, keep), PGN(window)),)


@recipe(
    "tpgn",
    citation="PGN: The RNN's New Successor is Effective for Long-Range Time Series Forecasting (2024), TPGN",
    cases=[Case(samples.series, ("causality", "cost", "gradient", "state", "reversible"), {"period": 3, "periods": 2})],
)
def tpgn(period: int, periods: int = 4, sites: str = "rnn[...]", keep: str = "") -> tuple[Rewrite, ...]:
    """The two-dimensional form of `pgn`: a series as rows of one ``period``, read along the row and down the column.

    h_t = A [x_(t-P+1) .. x_(t-1)] + A' [x_(t-RP) .. x_(t-2P), x_(t-P)], P the ``period`` and R the ``periods`` before,
    zeros before the first token; the gate is that of `pgn`. Short changes are in the row, what returns each day or week
    is in the column, and neither window is as long as R periods. The published network has two branches, one a PGN down
    the columns and one that is linear in the row, for a fixed length; here one gate reads both, for any length.
    """
    if period < 2:
        raise ArgumentError("a row has two tokens or more", found=f"period={period}", expected="period=24, for example")
    return (Mix(chosen(sites, keep), PGN(period - 1, period, periods)),)
