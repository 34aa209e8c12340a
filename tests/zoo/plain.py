"""torch's own attention modules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.zoo.spec import VOCAB, Case, Inputs, Spec, noise, padding, tokens

D, HEADS = 64, 4


class Weighted(nn.Module):
    """nn.MultiheadAttention that returns its weights, which opens it: baddbmm, softmax, bmm."""

    def __init__(self, *, averaged: bool = True) -> None:
        super().__init__()
        self.averaged = averaged
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, N, D), keep: (B, N) bool -> (B, N, D), weights"""
        mask = None if keep is None else ~keep
        return self.attention(x, x, x, key_padding_mask=mask, need_weights=True, average_attn_weights=self.averaged)


class Cross(nn.Module):
    """nn.MultiheadAttention with keys and values of other widths than the queries, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, HEADS, kdim=32, vdim=48, add_bias_kv=True)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """x: (B, N, D), k: (B, M, 32), v: (B, M, 48) -> (B, N, D)"""
        x, k, v = (t.transpose(0, 1) for t in (x, k, v))
        return self.attention(x, k, v, need_weights=False)[0].transpose(0, 1)


class Causal(nn.Module):
    """A decoder made of nn.TransformerEncoder and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, 128, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(VOCAB, D)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, N) -> (B, N, VOCAB)"""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.embed(ids), mask=mask, is_causal=True))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, HEADS, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(D, HEADS, 128, batch_first=True), 2)


def _transformer() -> nn.Module:
    return nn.Transformer(D, HEADS, 1, 1, 128, batch_first=True)


def _one(batch: int, length: int) -> Inputs:
    return Inputs((noise(batch, length, D),), {})


def _two(batch: int, length: int) -> Inputs:
    return Inputs((noise(batch, length, D), noise(batch, length + 5, D)), {})


def _padded(batch: int, length: int) -> Inputs:
    return Inputs((noise(batch, length, D),), {"src_key_padding_mask": ~padding(batch, length)})


def _decoded(batch: int, length: int) -> Inputs:
    mask = torch.full((length, length), float("-inf")).triu(1)
    return Inputs((noise(batch, length, D), noise(batch, length + 5, D)), {"tgt_mask": mask, "tgt_is_causal": True})


def _detected(batch: int, length: int) -> Inputs:
    """torch looks whether the mask is causal: a data-dependent branch, on which export of the whole model fails."""
    inputs = _decoded(batch, length)
    return Inputs(inputs.args, {"tgt_mask": inputs.kwargs["tgt_mask"]})


def _kept(batch: int, length: int) -> Inputs:
    return Inputs((noise(batch, length, D),), {"keep": padding(batch, length)})


def _cross(batch: int, length: int) -> Inputs:
    return Inputs((noise(batch, length, D), noise(batch, length + 5, 32), noise(batch, length + 5, 48)), {})


def _self(batch: int, length: int) -> Inputs:
    x = noise(batch, length, D)
    return Inputs((x, x, x), {"need_weights": False})


def _ids(batch: int, length: int) -> Inputs:
    return Inputs((tokens(batch, length),), {})


def _spec(
    name: str,
    model: Callable[[], nn.Module],
    make: Callable[[int, int], Inputs],
    cores: int,
    mask: str,
    causal: bool = False,
) -> Spec:
    return Spec(name, "torch", "", lambda: Case(model(), make, causal=causal), cores, mask=mask)


def specs() -> list[Spec]:
    return [
        _spec("encoder", _encoder, _one, 2, "bidirectional"),
        _spec("encoder_padded", _encoder, _padded, 2, "varied"),
        _spec("encoder_causal", Causal, _ids, 2, "causal", causal=True),
        _spec("decoder", _decoder, _decoded, 4, "causal,bidirectional,causal,bidirectional", causal=True),
        _spec("decoder_detected", _decoder, _detected, 4, "causal,bidirectional,causal,bidirectional", causal=True),
        _spec("transformer", _transformer, _two, 3, "bidirectional"),
        _spec("mha", lambda: nn.MultiheadAttention(D, HEADS, batch_first=True), _self, 1, "bidirectional"),
        _spec("mha_weights", Weighted, _one, 1, "bidirectional"),
        _spec("mha_weights_padded", lambda: Weighted(averaged=False), _kept, 1, "varied"),
        _spec("mha_cross", Cross, _cross, 1, "bidirectional"),
    ]
