"""PGN against its equations, token by token; what it takes the place of, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.passes.mix.mixers import PGN, Linear
from tests.ir.match.found import find
from tests.recipes.checks import causal, gradients, new_parameters, randomise, reverted

X = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(5))
WINDOW = 3


class Series(nn.Module):
    """A recurrent layer between two maps, or the part of its result that ``reads`` names. x: (B, N, 5)"""

    def __init__(self, cell: Any = nn.GRU, reads: str = "out", first: bool = True, **options: Any) -> None:
        super().__init__()
        self.reads, self.first = reads, first
        self.inp, self.rnn = nn.Linear(5, 6), cell(6, 4, batch_first=first, **options)
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inp(x)
        y = y if self.first else y.transpose(0, 1)
        start = torch.ones(1, y.size(0), 4) if self.reads == "start" else None
        out, last = self.rnn(y, start)
        if self.reads == "last":
            return self.head(out + last[-1].unsqueeze(1))
        if self.reads == "cell":
            return self.head(out + last[1][-1].unsqueeze(1))
        return self.head(out if self.first else out.transpose(0, 1))


def series(*args: Any, **options: Any) -> Series:
    torch.manual_seed(0)
    return Series(*args, **options).eval()


def by_token(x: Tensor, layers: Any) -> Tensor:
    """(B, N, C) -> (B, N, H)"""
    for layer in layers:
        outs: list[Tensor] = []
        for t in range(x.size(1)):
            h = layer.history.bias.expand(x.size(0), -1)
            for back in range(1, WINDOW + 1):
                if t - back >= 0:
                    h = h + x[:, t - back] @ layer.history.weight[:, :, WINDOW - back].T
            z, c = (torch.cat([x[:, t], h], -1) @ layer.gate.weight.T + layer.gate.bias).chunk(2, -1)
            outs.append(torch.sigmoid(z) * h + (1 - torch.sigmoid(z)) * torch.tanh(c))
        x = torch.stack(outs, 1)
    return x


@pytest.mark.parametrize(
    ("cell", "options"),
    [(nn.GRU, {"reads": "last"}), (nn.LSTM, {"num_layers": 2}), (nn.RNN, {"first": False})],
    ids=["gru", "lstm of two layers", "rnn, time first"],
)
def test_it_is_its_equations_token_by_token(cell: type[nn.RNNBase], options: dict[str, Any], tmp_path: Path) -> None:
    plain = series(cell, **options)
    model: Any = gatecc.transform(plain, gatecc.recipe("pgn", window=WINDOW), (X,), scope="model", verify=False)
    new = new_parameters(model, plain)
    randomise(new.values(), 0.5)
    for x in (X, X[:1, :2]) if cell is nn.GRU else (X,):
        wanted = by_token(plain.inp(x), model.rnn.mixer.layers)
        wanted = wanted + wanted[:, -1:] if plain.reads == "last" else wanted
        assert torch.allclose(model(x), plain.head(wanted), atol=1e-5)
    gradients(model, new, model(X))
    assert all(p.grad is None for p in plain.rnn.parameters())
    if cell is nn.RNN:
        gatecc.save(model, tmp_path)
        assert torch.equal(gatecc.load(series(cell, **options), tmp_path)(X), model(X))
    reverted(model, plain, (X,))


def test_a_token_reads_its_window_and_no_more() -> None:
    """As a scope of its own, whose last state is an output too."""
    plain = series()
    model = gatecc.transform(plain, gatecc.recipe("pgn", window=WINDOW), (X,), verify=False)
    assert [row.scope for row in gatecc.last_report(model).rewrites] == ["rnn"]
    randomise(new_parameters(model, plain).values(), 0.5)
    assert causal(model, X, 4)
    other = X.clone()
    other[:, 2] += 1
    with torch.no_grad():
        moved = ((model(other) - model(X)).abs().amax((0, -1)) > 1e-6).nonzero().flatten().tolist()
    assert moved == [2, 3, 4, 5], "tokens t - 3 to t"
    graph = gatecc.last_report(model).graphs[0].after
    assert graph is not None
    assert not any("gru" in node.name for node in graph.nodes)


def refused(model: nn.Module, x: Tensor, rewrite: gatecc.Rewrite) -> str:
    """What the rewrite says of the first site of its kind."""
    found = find(model, x)
    site = found.sites(rewrite.site.kind)[0]
    with pytest.raises(SiteRefusedError) as error:
        rewrite.rewrite(site, Editor(found.program, site, rewrite.name, sites=found.all.sites))
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"bidirectional": True}, "both directions"),
        ({"reads": "start"}, "state that is not zero"),
        ({"cell": nn.LSTM, "reads": "cell"}, "cell state"),
        ({"num_layers": 2, "reads": "last"}, "last hidden states of 2 layers"),
    ],
)
def test_what_a_window_cannot_replace_is_refused(options: dict[str, Any], found: str) -> None:
    assert found in refused(series(**options), X, gatecc.Mix(gatecc.RNN[...], PGN()))


def test_each_mixer_has_its_kind_of_site() -> None:
    assert "linear takes the place of attention" in refused(series(), X, gatecc.Mix(gatecc.RNN[...], Linear()))
    encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    said = refused(encoder, torch.randn(2, 4, 6), gatecc.Mix(gatecc.Attention[...], PGN()))
    assert "pgn takes the place of rnn" in said


def by_phase(x: Tensor, layers: Any) -> Tensor:
    """By the rows of a period of 3, the 2 tokens before, and a column of two earlier periods. (B, N, C) -> (B, N, H)"""
    for layer in layers:
        outs: list[Tensor] = []
        for t in range(x.size(1)):
            h = layer.history.bias.expand(x.size(0), -1)
            for steps, weight in (((2, 1), layer.history.weight), ((6, 3), layer.column.weight)):
                for at, back in enumerate(steps):
                    if t >= back:
                        h = h + x[:, t - back] @ weight[:, :, at].T
            z, c = (torch.cat([x[:, t], h], -1) @ layer.gate.weight.T + layer.gate.bias).chunk(2, -1)
            outs.append(torch.sigmoid(z) * h + (1 - torch.sigmoid(z)) * torch.tanh(c))
        x = torch.stack(outs, 1)
    return x


def test_the_second_dimension_is_the_same_phase_of_earlier_periods() -> None:
    """The stack is of nn.LSTM and nn.GRU."""
    for cell in (nn.LSTM, nn.GRU):
        plain = series(cell)
        model: Any = gatecc.transform(plain, gatecc.recipe("tpgn", period=3, periods=2), (X,), verify=False)
        new = new_parameters(model, plain)
        randomise(new.values(), 0.5)
        for n in (9, 2):
            with torch.no_grad():
                wanted = plain.head(by_phase(plain.inp(X[:, :n]), model.rnn.mixer.layers))
                assert torch.allclose(model(X[:, :n]), wanted, atol=1e-5)
        assert all(causal(model, X, at) for at in (1, 4, 7))
        gradients(model, new, model(X))
    with pytest.raises(ArgumentError, match="two tokens or more"):
        gatecc.recipe("tpgn", period=1)


def audio() -> tuple[Any, Tensor, Any]:
    hf: Any = pytest.importorskip("transformers")
    sizes = {"num_filters": 4, "hidden_size": 6, "upsampling_ratios": [2], "num_lstm_layers": 2}
    plain = hf.EncodecModel(hf.EncodecConfig(**sizes)).encoder.eval()
    return plain, torch.randn(2, 1, 22), next(m for m in plain.modules() if isinstance(m, nn.LSTM))


def transducer() -> tuple[Any, Tensor, Any]:
    hf: Any = pytest.importorskip("transformers.models.parakeet.modeling_parakeet")
    config = hf.ParakeetRNNTConfig(vocab_size=12, decoder_hidden_size=6, num_decoder_layers=1)
    plain = hf.ParakeetRNNTDecoder(config).eval()
    return plain, torch.randint(0, 12, (2, 11)), plain.lstm


@pytest.mark.broad(2)
@pytest.mark.parametrize("family", [audio, transducer])
def test_recurrent_layers_of_others(family: Any) -> None:
    """Those of Encodec, whose time comes first, and of the prediction network of Parakeet."""
    torch.manual_seed(0)
    plain, x, rnn = family()
    model: Any = gatecc.transform(plain, gatecc.recipe("tpgn", period=3, periods=2), (x,))
    new = new_parameters(model, plain)
    randomise(new.values(), 0.5)
    layers = next(m for n, m in model.named_modules() if n.endswith("mixer.layers"))

    def replaced(module: Any, args: Any, out: Any) -> Any:
        given = args[0] if rnn.batch_first else args[0].transpose(0, 1)
        made = by_phase(given, layers)
        return (made if rnn.batch_first else made.transpose(0, 1), out[1])

    for inputs in (x, x[:1]):
        with torch.no_grad():
            got = model(inputs)
            handle = rnn.register_forward_hook(replaced)
            wanted = plain(inputs)
            handle.remove()
        assert torch.allclose(got, wanted, atol=1e-5)
    gradients(model, new, model(x))
    reverted(model, plain, (x,))
