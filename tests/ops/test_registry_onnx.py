"""Every operator has an answer for each target: a graph that computes what it does, or its name and the model's line.

A new operator without a line here fails. GATECC_ZOO=all tries all for each target; by default those without a test of
their own are tried, for one target.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import ExportError
from gatecc.ops import registry

pytest.importorskip("onnxruntime")
TARGETS: tuple[Any, ...] = ("ort", "portable", "opset27")
ALL = os.getenv("GATECC_ZOO") == "all"
C, H, D, E = 8, 2, 4, 3
gated: Any = torch.ops.gatecc
aten: Any = torch.ops.aten


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X = noise(2, 5, C)


@dataclass(frozen=True)
class Case:
    """``call`` is given x: (B, N, C), further inputs, and parameters of these shapes; ``refused``: why it cannot be."""

    call: Callable[..., Any]
    weights: tuple[tuple[int, ...], ...] = ()
    inputs: tuple[Tensor, ...] = (X,)
    refused: str = ""
    verify: bool = True
    own: bool = False  # whether the operator's package has a test of its ONNX form
    least: int = 1  # the length from which on the model runs in one graph


class Called(nn.Module):
    """One operator."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator) * 0.5 for shape in case.weights)
        self.call = case.call

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return self.call(x, *more, *self.weights)


def heads(x: Tensor) -> Tensor:
    """(B, N, C) -> (B, H, N, D)"""
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def attention(x: Tensor, qkv: Tensor, sinks: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (heads(y) for y in (x @ qkv.T).chunk(3, -1))
    N = x.size(1)
    near = torch.arange((N + 1) // 2)[:, None] - torch.arange((N + 2) // 3) * 2
    blocks = (near.abs() < 3)[None, None]
    options = {"causal": True, "window": 4, "gate_activation": "sigmoid"}
    fused = gated.attention(q, k, v, q, **options)
    capped = gated.attention(q, k, v, None, None, sinks, softcap=2.0, causal=True)
    return fused[0], *capped, gated.attention(q, k, v, blocks=blocks, block_sizes=[2, 3])[0]


def cached_attention(x: Tensor, past: Tensor, qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (heads(y) for y in (x @ qkv.T).chunk(3, -1))
    return gated.cached_attention(q, k, v, past, past * 0.5, scale=0.5, window=4)


def evicted_attention(x: Tensor, qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (heads(y) for y in (x @ qkv.T).chunk(3, -1))
    keep, valid = (k[:, :, :, 0] > 0).float(), x[:, :, 0] > -1
    plain = gated.evicted_attention(q, k, v, keep, scale=0.5)[0]
    return plain, gated.evicted_attention(q, k, v, keep, valid, scale=0.5, budget=2, softcap=3.0, spread=True)[0]


def linear_attention(x: Tensor) -> tuple[Tensor, ...]:
    q, k = heads(x), F.normalize(heads(x), dim=-1)
    decay, beta = F.logsigmoid(q), q[..., 0].sigmoid()
    plain, ruled = gated.linear_attention(q, k, q, decay), gated.linear_attention(q, k, q, decay, beta, reverse=True)
    return *plain, *ruled, gated.linear_attention(q.exp(), k.exp(), q, normalize=True)[0]


def one_step(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    q = heads(x)[:, :, 0]
    after = state.clone()
    return gated.linear_attention_step(q, q, q, F.logsigmoid(q), q[..., 0].sigmoid(), after), after


def moe_ffn(x: Tensor, router: Tensor, *experts: Tensor) -> Tensor:
    return gated.moe_ffn(*routed(x, router), *experts).unflatten(0, x.shape[:2])


def routed(x: Tensor, router: Tensor) -> tuple[Tensor, ...]:
    rows = x.flatten(0, 1)
    weights, indices = (rows @ router.T).softmax(-1).topk(2, -1)
    return rows, weights, torch.where(weights < 0.2, E, indices)


def grouped(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(x: Tensor, router: Tensor, matrices: Tensor) -> Tensor:
        rows, of = x.flatten(0, 1), (x.flatten(0, 1) @ router.T).argmax(-1)
        order = of.argsort(stable=True)
        ends = (of[:, None] <= torch.arange(E)).sum(0).to(torch.int32)
        return call(rows[order], matrices, ends)

    return called


def layer(kind: str, gates: int) -> Case:
    """A layer of torch in both directions, read backwards from its states."""

    def called(x: Tensor, start: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        before = start.expand(-1, x.size(0), -1).contiguous()
        states = [before, before] if kind == "lstm" else before
        return getattr(aten, kind).input(x, states, list(weights), True, 1, 0.0, False, True, True)

    one = ((gates * D, C), (gates * D, D), (gates * D,), (gates * D,))
    return Case(called, ((2, 1, D), *one, *one), own=True)


def only_if(x: Tensor) -> Tensor:
    return gated.only_if(torch.tanh(x) * 2, x, x.sum() > 0, "branch")


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    y, state = gated.short_convolution(x, weight, bias, activation="silu")
    return gated.short_convolution(y, weight, None, state)


def no_form(call: Callable[..., Any], *weights: tuple[int, ...]) -> Case:
    return Case(call, weights, refused="a gradient")


def blocks(x: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of blocks of two tokens, and those that are kept."""
    scores = gated.block_logits(heads(x), heads(x), query, key, None, 2, 10.0)
    return scores, gated.block_choice(scores, torch.tensor(0.5), None, 2, True, True)


def chosen_blocks(x: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Blocks of two tokens, half of them kept, and those that exceed a probability where there is padding."""
    y, cut, keep = heads(x), torch.tensor(0.5), x[:, :, 0] > -1
    options: Any = {"block": 2, "scale": 0.5, "base": 10.0}
    ranked = gated.chosen_blocks(y, y, y * 0.5, y, y, query, key, cut, **options)[0]
    return ranked + gated.chosen_blocks(y, y, y, y, y, query, key, cut, keep, **options, ranked=False, spread=True)[0]


def chosen_loss(x: Tensor, *weights: Tensor, grad: Tensor | None = None) -> Any:
    y, rules = heads(x), (None, 2, 0.5, 10.0)
    if grad is None:
        return gated.chosen_loss(y, y, y, y, *weights, *rules)
    return gated.chosen_loss_backward(grad, y, y, y, y, *weights, *rules)


def gated_conv(x: Tensor, weight: Tensor) -> Tensor:
    line = {"stride": [1], "padding": [1], "dilation": [1], "output_padding": [0], "groups": 1}
    return gated.gated_conv(x.mT, weight, (x.mean(1)[:, :6, None] > 0).to(x.dtype), transposed=False, **line)


EXPERTS = ((E, C), (E, 12, C), (E, C, 6))
POOLED = ((H, 3 * D, D), (H, 3 * D, D))
GRU = ((3 * D, C), (3 * D, D), (3 * D,), (3 * D,))
SIX = {"needs": [True] * 6}
CASES: dict[str, Case] = {
    # torch takes one block and several for two graphs
    "gatecc.attention": Case(attention, ((3 * C, C), (H,)), own=True, least=4),
    "gatecc.attention_backward": no_form(
        lambda x: gated.attention_backward(
            heads(x), None, *(heads(x), heads(x)[..., 0]), *(heads(x),) * 3, needs=[True] * 3 + [False] * 3
        )
    ),
    "gatecc.cached_attention": Case(cached_attention, ((3 * C, C),), (X, noise(2, H, 3, D)), own=True),
    "gatecc.carried": Case(lambda x, table: gated.carried(x * 2, table, [3]) + 1, ((6, C),)),
    "aten._grouped_mm": Case(
        lambda x, *more: grouped(aten._grouped_mm)(x.bfloat16(), *(w.bfloat16() for w in more)).float(),
        ((E, C), (E, C, 8)),
        own=True,
        verify=False,  # torch traces it in bfloat16 alone, for which ONNX Runtime has no products
    ),
    "transformers.grouped_mm_fallback": Case(
        grouped(lambda *given: torch.ops.transformers.grouped_mm_fallback(*given)), ((E, C), (E, C, 8)), own=True
    ),
    "gatecc.linear": Case(
        lambda x, w, b: gated.linear(gated.linear(x, w, b, "gelu_tanh"), w, b, "silu"), ((C, C), (C,))
    ),
    "gatecc.evicted_attention": Case(evicted_attention, ((3 * C, C),)),
    "gatecc.linear_attention": Case(linear_attention, own=True),
    "gatecc.linear_attention_backward": no_form(
        lambda x: gated.linear_attention_backward(heads(x), heads(x).mT @ heads(x), *(heads(x),) * 3)
    ),
    "gatecc.linear_attention_step": Case(one_step, (), (X, noise(2, H, D, D)), "a state that is written to"),
    "gatecc.moe_ffn": Case(moe_ffn, EXPERTS, own=True),
    "gatecc.moe_ffn_training": no_form(lambda x, router, *w: gated.moe_ffn_training(*routed(x, router), *w), *EXPERTS),
    "gatecc.moe_ffn_backward": no_form(
        lambda x, router, *w: gated.moe_ffn_backward(x[0], x[0].repeat(2, 1)[:, :6], *routed(x[:1], router), *w, **SIX),
        *((E, C), (E, 6, C), (E, C, 3)),
    ),
    "gatecc.only_if": Case(only_if),
    "gatecc.block_logits": Case(lambda *given: blocks(*given)[0], POOLED, least=4),
    "gatecc.block_logits_backward": no_form(
        lambda x, *w: gated.block_logits_backward(
            (heads(x) @ heads(x).mT)[..., :3, :3], heads(x), heads(x), *w, None, 2, 0.0
        ),
        *POOLED,
    ),
    "gatecc.block_choice": Case(lambda *given: blocks(*given)[1], POOLED, least=4),
    "gatecc.block_peaks": no_form(lambda x: gated.block_peaks(heads(x), heads(x), None, 2)),
    "gatecc.chosen_blocks": Case(chosen_blocks, ((2, 4, 4), (2, 12, 4)), least=4),
    "gatecc.chosen_loss": no_form(lambda x, *w: chosen_loss(x, *w), (2, 4, 4), (2, 12, 4)),
    "gatecc.chosen_loss_backward": no_form(lambda x, *w: chosen_loss(x, *w, grad=x.sum()), (2, 4, 4), (2, 12, 4)),
    "gatecc.gated_conv": Case(gated_conv, ((6, C, 3),), own=True),
    "gatecc.group_linear": Case(
        lambda x, w: gated.group_linear(x, w, torch.tensor([[1, 0], [0, 1], [1, 1]]).bool()), ((6, C),)
    ),
    "gatecc.masked_linear": Case(
        lambda x, w: gated.masked_linear(x, w, None, (x.mean(1) > 0).to(x.dtype), (w[:1, :6] > 0).to(x.dtype)),
        ((6, C),),
    ),
    "gatecc.spike": Case(lambda x: gated.spike(x, 2.0)),
    "gatecc.transient": Case(
        lambda x, *w: gated.transient(x, x[..., 0] > 0, *w), GRU, refused="No ONNX function found"
    ),
    "gatecc.transient_backward": no_form(
        lambda x, *w: gated.transient_backward(x[..., :D], x[:, 0, :D], x, x[..., 0] > 0, *w, x[:, 1, :D]), *GRU
    ),
    "aten.gru": layer("gru", 3),
    "aten.rnn_tanh": layer("rnn_tanh", 1),
    "aten.rnn_relu": layer("rnn_relu", 1),
    "aten.lstm": layer("lstm", 4),
    "gatecc.rnn": Case(lambda x, *w: gated.rnn(x, *w, "gru"), GRU, own=True),
    "gatecc.rnn_backward": no_form(
        lambda x, *w: gated.rnn_backward(x[..., :D], x[None, :, 0, :D], x, *w, x[None, :, 0, :D], "gru"), *GRU
    ),
    "gatecc.sequences": Case(
        lambda x, mask: gated.sequences(mask, True, 0, False, False).to(x.dtype) + x[..., 0],
        inputs=(X, torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()),
        refused="asserts the form of a mask",
        own=True,
    ),
    "gatecc.short_convolution": Case(short_convolution, ((C, 1, 3), (C,))),
    "gatecc.short_convolution_backward": no_form(
        lambda x, w: gated.short_convolution_backward(x, None, x, w, needs=[True, True, False, False]), (C, 1, 3)
    ),
    "gatecc.add_loss": Case(lambda x: gated.add_loss(x * 2, x.mean(), x.sum()) + 1),
    "gatecc.record": Case(lambda x: (gated.record(x[0, 0], x[0, 1, 1:], x[0, 0, :1]), x)[1], refused="in a buffer"),
    "gatecc.boundary": Case(lambda x: gated.boundary(x * 2, 0, 0) + 1, refused="alias annotation"),
    "gatecc.in_segments": Case(
        lambda x, s: gated.in_segments(heads(x), heads(x), s, True, "x", ""),
        inputs=(X, torch.tensor([[0, 0, 1, 2, 1]] * 2)),
    ),
    "gatecc.inject_bce": Case(lambda x: gated.inject_bce(x * 2, x, 0.5) + 1),
    "gatecc.reinforce_sample": Case(
        lambda x: gated.reinforce_sample(x, x.sigmoid() * 0.9, x[0, 0], x.sum(), x[0, 0, :3], "mean")
    ),
    "gatecc.reinforce_backward": no_form(
        lambda x: gated.reinforce_backward(x, x, x, x[:, 0, 0], torch.tensor(2), x[0, 0, :3], "mean")
    ),
}


def known() -> set[str]:
    """All that gatecc has entered, and all that it has defined, but what runs on several processes alone."""
    entered = [operator.overload for operator in registry.operators()]
    names = [str(o._schema.name) for o in entered if o.namespace in ("gatecc", "aten", "transformers")]
    names += [name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gatecc::")]
    return {name.replace("::", ".") for name in names if "moe_ffn_spread" not in name}


def test_every_operator_has_a_line() -> None:
    pytest.importorskip("transformers.integrations.moe")  # defines its operator
    assert known() == set(CASES)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if ALL or not case.own])
def test_it_is_exported_or_refused(name: str, tmp_path: Path) -> None:
    case, at = CASES[name], list(CASES).index(name)
    for target in TARGETS if ALL else TARGETS[at % 3 : at % 3 + 1]:
        if case.refused:
            with pytest.raises(ExportError, match=rf"(?s){case.refused}") as told:
                gatecc.export(Called(case), tmp_path / "x", case.inputs, target=target)
            assert re.search(rf"test_registry_onnx.py:\d+: {re.escape(name)}", str(told.value))
            continue
        made = gatecc.export(Called(case), tmp_path / "x", case.inputs, target=target, verify=case.verify)
        assert target == "ort" or not [op for op in made.operators if "::" in op]
        if case.verify:
            assert {c.sizes["batch"] for c in made.compared} == {1, 3}
            assert {c.sizes["sequence"] for c in made.compared} >= {case.least, 7, 131} - {4}
