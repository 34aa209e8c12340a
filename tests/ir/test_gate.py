"""Gates: identity, shapes, gradients, capture, and which choices go together."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule, GateShape, GateSpec, SourceShape
from tests.ir.gates.specs import SIZES, VALUE_AXES, VALUES, B, C, D, H, N, made, place, specs

IDENTITIES = ("identity", "identity(how=fold)", "identity(how=bias, bias=8.0)")


def build(spec: GateSpec, axes: str) -> tuple[GateModule, Tensor, tuple[Tensor, ...]]:
    shape, value, sources = place(spec, axes)
    return spec.build(shape).eval(), value, sources


def fitting(spec: GateSpec, axes: str) -> tuple[GateModule, Tensor, tuple[Tensor, ...]]:
    """As build; places where the gate cannot stand are drawn again."""
    built = made(lambda: build(spec, axes))
    assume(built is not None)
    assert built is not None
    return built


# -- identity ----------------------------------------------------------------------------------------------------------


@given(specs(IDENTITIES), st.sampled_from(VALUE_AXES))
def test_identity_is_exact_or_reports_its_residual(spec: GateSpec, axes: str) -> None:
    gate, value, sources = fitting(spec, axes)
    away = (gate(value, *sources) * spec.fold_factor - 1).abs().max()
    assert away <= spec.residual + 1e-7
    assert spec.contract().kind == "identity_at_init"
    assert spec.contract().tolerance == max(1e-6, spec.residual)


@pytest.mark.parametrize(
    "text",
    [
        "hidden, linear, head, sigmoid",
        "hidden, linear, element, sigmoid(scale=2.0)",
        "hidden, linear, element, 1+tanh",
        "self, linear, channel, softmax",
        "self, linear, channel, softmax(T=3, pre_activation=gelu)",
        "hidden, mlp(3), channel, relu",
        "param, none, token*head, linear",
        "hidden, linear, head, sigmoid, init=identity(how=fold)",
        "hidden, linear, channel, threshold, estimator=supervised",
        "hidden, linear, head, sigmoid, estimator=st",
        "hidden, linear, head, sigmoid, estimator=reinforce",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_these_gates_start_at_exactly_one(text: str, dtype: torch.dtype) -> None:
    spec = GateSpec.parse(text)
    shape, value, sources = place(spec, "bnc")
    gate = spec.build(shape, dtype=dtype).eval()
    out = gate(value.to(dtype), *[s.to(dtype) for s in sources])
    assert out.dtype == dtype
    assert torch.equal(out * spec.fold_factor, torch.ones_like(out))
    assert spec.residual == 0


def test_a_softmax_of_any_size_starts_at_exactly_one() -> None:
    for size in range(2, 200):
        shape = GateShape("bnc", {"c": size}, (SourceShape("bnc", size),))
        gate = GateSpec("self", "linear", "channel", "softmax").build(shape)
        x = torch.randn(1, 2, size)
        assert torch.equal(gate(x, x), torch.ones(1, 2, size))


def test_a_bias_reports_its_residual() -> None:
    assert GateSpec("hidden", init="identity(how=bias, bias=6)").residual == pytest.approx(1 - 0.99752738, abs=1e-6)
    assert GateSpec("hidden", activation="sigmoid(bias=6)").residual == pytest.approx(1 - 0.99752738, abs=1e-6)
    assert GateSpec("hidden", activation="tanh").residual == pytest.approx(1.2e-5, abs=1e-6)


# -- shapes ------------------------------------------------------------------------------------------------------------

SHAPES = {
    ("bhnd", "head"): (B, H, N, 1),
    ("bhnd", "element"): (B, H, N, D),
    ("bhnd", "channel"): (B, H, N, D),
    ("bhnd", "token"): (B, 1, N, 1),
    ("bhnd", "scalar"): (B, 1, N, 1),
    ("bhnd", "token*head"): (B, H, N, 1),
    ("bhnd", "expert"): (B, N, 3),
    ("bnhd", "head"): (B, N, H, 1),
    ("bnhd", "element"): (B, N, H, D),
    ("bnhd", "token"): (B, N, 1, 1),
    ("gnd", "head"): (B * H, N, 1),
    ("gnd", "element"): (B * H, N, D),
    ("gnd", "token"): (B * H, N, 1),
    ("bnc", "head"): (B, N, H * D),
    ("bnc", "element"): (B, N, H * D),
    ("bnc", "token"): (B, N, 1),
    ("bnc", "expert"): (B, N, 3),
    ("bcyx", "pixel"): (B, 1, 2, 3),
    ("bcyx", "element"): (B, H * D, 2, 3),
    ("bcyx", "token"): (B, 1, 2, 3),
    ("bcn", "channel"): (B, H * D, N),
}


@pytest.mark.parametrize(("axes", "granularity"), SHAPES)
def test_shapes(axes: str, granularity: str) -> None:
    spec = GateSpec("hidden", "linear", granularity, init="random(std=0.5)")
    gate, value, sources = build(spec, axes)
    assert gate(value, *sources).shape == SHAPES[axes, granularity]


@given(specs(), st.sampled_from(VALUE_AXES))
def test_a_gate_broadcasts_to_its_value(spec: GateSpec, axes: str) -> None:
    gate, value, sources = fitting(spec, axes)
    out = gate(value, *sources)
    assert out.isfinite().all()
    if "expert" not in spec.granularity.names:
        assert (out * value).shape == value.shape


@pytest.mark.parametrize("axes", ["bhnd", "bnhd", "gnd", "bnc"])
@pytest.mark.parametrize("granularity", ["head", "element", "token", "scalar"])
def test_every_layout_of_the_heads_has_the_same_gate(axes: str, granularity: str) -> None:
    """A gate of (B, N, H, D) written by hand, against each layout of the value."""
    x, weight, bias = torch.randn(B, N, C), torch.randn(H * D, C), torch.randn(H * D)
    rows = {"head": H, "element": H * D}.get(granularity, 1)
    shape = GateShape(axes, SIZES, (SourceShape("bnc", C),))
    gate = GateSpec("hidden", "linear", granularity, "sigmoid", init="zero").build(shape)
    gate.load_state_dict({"weight": weight[:rows], "bias": bias[:rows]})
    z = torch.sigmoid(x @ weight[:rows].T + bias[:rows])
    want = z.unflatten(-1, {"head": (H, 1), "element": (H, D)}.get(granularity, (1, 1))).expand(B, N, H, D)
    v = torch.randn(B, N, H, D)
    laid = {
        "bnhd": v,
        "bhnd": v.transpose(1, 2),
        "gnd": v.transpose(1, 2).flatten(0, 1),
        "bnc": v.flatten(2),
    }[axes]
    got = laid * gate(laid, x)
    back = {
        "bnhd": lambda t: t,
        "bhnd": lambda t: t.transpose(1, 2),
        "gnd": lambda t: t.unflatten(0, (B, H)).transpose(1, 2),
        "bnc": lambda t: t.unflatten(2, (H, D)),
    }[axes](got)
    torch.testing.assert_close(back, v * want)


@pytest.mark.parametrize("granularity", ["head", "element", "head*token"])
def test_one_head_by_itself_needs_no_axis_for_its_number(granularity: str) -> None:
    """Attention that runs head after head: values (B, N, D) beside sizes that know of one head."""
    shape = GateShape("bnd", {"h": 1, "d": D}, (SourceShape("bnc", C),))
    gate = GateSpec("hidden", "linear", granularity, init="random(std=1)").build(shape)
    value, x = torch.randn(B, N, D), torch.randn(B, N, C)
    assert gate(value, x).expand(B, N, D).shape == value.shape
    bnhd = GateShape("bnhd", {"h": 1, "d": D}, (SourceShape("bnc", C),))
    same = GateSpec("hidden", "linear", granularity, init="random(std=1)").build(bnhd)
    same.load_state_dict(gate.state_dict())
    torch.testing.assert_close(value * gate(value, x), (value.unsqueeze(2) * same(value.unsqueeze(2), x)).squeeze(2))


def test_pixels_gate_tokens_and_tokens_gate_flat_ones() -> None:
    x = torch.randn(B, C, 2, 3)
    spec = GateSpec("hidden", "linear", "token", init="random(std=1)")
    image = spec.build(GateShape("bnc", {"c": 8}, (SourceShape("bcyx", C),)))
    tokens = spec.build(GateShape("bnc", {"c": 8}, (SourceShape("bnc", C),)))
    flat = spec.build(GateShape("nc", {"c": 8}, (SourceShape("bnc", C),)))
    value, seq = torch.randn(B, 6, 8), x.flatten(2).mT
    for gate in (tokens, flat):
        gate.load_state_dict(image.state_dict())
    torch.testing.assert_close(image(value, x), tokens(value, seq))
    torch.testing.assert_close(flat(value.flatten(0, 1), seq), tokens(value, seq).flatten(0, 1))


def test_pooled_and_cond_gates_vary_over_samples_only() -> None:
    shape = GateShape("bcyx", {"c": 8}, (SourceShape("bcyx", C), SourceShape("b")))
    gate = GateSpec(("pool(in)", "cond(t)"), "mlp(4)", "channel", init="random(std=1)").build(shape)
    assert gate(torch.randn(B, 8, 2, 3), torch.randn(B, C, 2, 3), torch.arange(B)).shape == (B, 8, 1, 1)


def test_scores_gate_edges() -> None:
    shape = GateShape("bhnm", {"h": H}, (SourceShape("bhnm", H),))
    scores = torch.randn(B, H, N, 7)
    assert GateSpec("self", "linear", "edge*head").build(shape)(scores, scores).shape == scores.shape
    assert GateSpec("self", "linear", "edge").build(shape)(scores, scores).shape == (B, 1, N, 7)


def test_parameters_for_each_token_refuse_another_length() -> None:
    gate = GateSpec("param", "none", "token*head", "linear").build(GateShape("bhnd", SIZES))
    assert gate.get_parameter("weight").shape == (N, H)
    assert gate(torch.randn(VALUES["bhnd"])).shape == (1, H, N, 1)
    with pytest.raises(RuntimeError):
        gate(torch.randn(B, H, 1, D))


# -- gradients and modes -----------------------------------------------------------------------------------------------


@given(specs(("random(std=0.5)", "uniform(bound=0.5)")), st.sampled_from(VALUE_AXES))
def test_the_gradient_reaches_every_parameter(spec: GateSpec, axes: str) -> None:
    assume(spec.estimator.tag != "reinforce")  # needs a reward: tests/ops/test_estimators.py
    assume(spec.activation.tag not in ("relu", "topk", "sinkhorn"))  # flat in places; sinkhorn cancels biases
    assume(spec.estimator.tag != "times_smooth")  # none where all units are off
    gate, value, sources = fitting(spec, axes)
    gate.train()
    out = gate(value, *sources)
    loss = (out * torch.randn_like(out)).sum()
    if not spec.trainable:
        assert not out.requires_grad
        return
    loss.backward()
    for name, p in gate.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@given(specs(), st.sampled_from(VALUE_AXES))
def test_eval_is_deterministic_and_copies_agree(spec: GateSpec, axes: str) -> None:
    gate, value, sources = fitting(spec, axes)
    out = gate(value, *sources)
    assert torch.equal(out, gate(value, *sources))
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert torch.equal(out, twin(value, *sources))
        assert twin.spec == spec
    assert not [name for name in gate.state_dict() if name.startswith("reward")]


@given(specs(("random(std=2.0)",)), st.sampled_from(VALUE_AXES))
def test_binary_gates_are_zero_or_one(spec: GateSpec, axes: str) -> None:
    assume(spec.estimator.tag in ("st", "reinforce", "supervised") or str(spec.estimator) == "gumbel(discrete=True)")
    gate, value, sources = fitting(spec, axes)
    for training in (False, True):
        out = gate.train(training)(value, *sources)
        assert ((out == 0) | (out == 1)).all()


def test_the_linear_gate_has_weight_and_bias_only() -> None:
    gate, _, _ = build(GateSpec("hidden", "linear", "head"), "bhnd")
    assert {k: tuple(v.shape) for k, v in gate.state_dict().items()} == {"weight": (H, C), "bias": (H,)}


def test_autocast_keeps_the_dtype_of_the_value() -> None:
    gate, value, sources = build(GateSpec("hidden", "linear", "channel", "softmax"), "bnc")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gate(value.bfloat16(), *sources).dtype == torch.bfloat16


# -- capture -----------------------------------------------------------------------------------------------------------


class Multiply(nn.Module):
    def __init__(self, gate: GateModule) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, value: Tensor, *sources: Tensor) -> Tensor:
        return value * self.gate(value, *sources)


EXPORTED = [
    ("hidden, linear, head, sigmoid", "bhnd"),
    ("hidden, linear, element, sigmoid", "gnd"),
    ("hidden, linear, head, sigmoid", "gnd"),
    ("hidden, lowrank(2), head, logsigmoid(16)", "bnc"),
    ("pool(hidden), mlp(3), channel, sigmoid", "bhnd"),
    ("hidden, attn, head, 1+tanh", "bnhd"),
    ("hidden, rnn(3), head, sigmoid", "bnhd"),
    ("hidden, rnn(3, cell=lstm), head, sigmoid", "bnc"),
    ("hidden, conv(3), channel, softmax", "bnc"),
    ("hidden, linear, channel, sinkhorn(iters=2), init=zero", "bnc"),
    ("hidden, linear, channel, topk(2), init=random", "bnc"),
    ("hidden, linear, channel, threshold, estimator=supervised", "bhnd"),
    ("hidden, linear, head, sigmoid, estimator=reinforce", "gnd"),
    ("hidden, linear, head, sigmoid, estimator=gumbel(discrete=True)", "bhnd"),
    ("param, none, channel, sigmoid", "gnd"),
]


STOCHASTIC = [(text, axes, True) for text, axes in EXPORTED if "estimator=" in text or "sinkhorn" in text]


@pytest.mark.parametrize(("text", "axes", "training"), [*((*case, False) for case in EXPORTED), *STOCHASTIC])
def test_export_with_dynamic_sizes(text: str, axes: str, training: bool) -> None:
    """One graph for every batch and length, whose eval form says what the module says."""
    spec = GateSpec.parse(text)
    gate, value, sources = build(spec, axes)
    model = Multiply(gate).train(training)
    dynamic = [torch.export.Dim.DYNAMIC if a in "bgn" else None for a in axes]
    free: list[list[object]] = [[torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC, None] for _ in sources]
    program = torch.export.export(
        model, (value, *sources), dynamic_shapes=(dynamic, tuple(free)) if free else (dynamic,)
    )
    program = program.run_decompositions({})
    larger = torch.randn([2 * s if a in "bgn" else s for a, s in zip(axes, value.shape, strict=True)])
    wider = [torch.randn(2 * B, 2 * N, C) for _ in sources]
    got = program.module()(larger, *wider)
    if training:
        assert got.shape == larger.shape
    else:
        torch.testing.assert_close(got, model(larger, *wider))


# -- fitted, reused, scheduled -----------------------------------------------------------------------------------------


def test_reuse_copies_a_weight() -> None:
    gate, value, sources = build(GateSpec("hidden", "linear", "head", init="reuse(proj.weight)"), "bhnd")
    weight = torch.randn(H, C)
    gate.reuse(weight)
    torch.testing.assert_close(gate(value, *sources).squeeze(-1), torch.sigmoid(sources[0] @ weight.T).mT)
    with pytest.raises(ArgumentError, match="another shape"):
        gate.reuse(torch.randn(H, C + 1))


# -- which choices go together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("param, linear, head", "scorer=none"),
        ("hidden, lookup(4), head", "cond(NAME)"),
        ("hidden, schedule, channel, linear", "cond(NAME)"),
        ("cond(t), schedule, channel, sigmoid", "activation=linear"),
        ("pool(hidden), attn, head", "with tokens"),
        ("hidden, linear, scalar, softmax", "granularity head"),
        ("hidden, linear, sample, sigmoid", "pool(...)"),
        ("hidden, linear, sample*token, sigmoid", "one of the two"),
        ("hidden, linear, heads, sigmoid", "scalar"),
        ("hidden, linear, head, tanh, estimator=st", "threshold"),
        ("hidden, linear, head, threshold", "estimator=st"),
        ("hidden, linear, head, silu", "init=zero"),
        ("hidden, linear(bias=False), head, linear", "bias"),
        ("hidden, none, channel, sigmoid", "init=zero"),
        ("hidden, linear, head, tanh, init=identity(how=fold)", "init=zero"),
        ("hidden, mlp(3), head, sigmoid, init=reuse(a.weight)", "scorer=linear"),
        ("pool(hidden), linear, head, fuse_into=q_proj", "scorer=linear"),
        ("hidden, linear, token, sigmoid, estimator=supervised", "channel"),
        ("param, none, head, sigmoid, estimator=reinforce", "a value to read"),
    ],
)
def test_choices_that_do_not_go_together(text: str, said: str) -> None:
    with pytest.raises(ArgumentError) as error:
        GateSpec.parse(text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "axes", "said"),
    [
        ("hidden, linear, pixel", "bnc", "axes"),
        ("pool(hidden), linear, element", "bnc", "not pooled"),
        ("hidden, linear, head", "bcyx", "sizes"),
        ("param, none, token", "bnc", "fixed size"),
        ("hidden, none, channel, sigmoid, init=zero", "bnc", "1 or"),
        ("cond(t), linear, element", "bnc", "not pooled"),
    ],
)
def test_places_where_a_gate_cannot_stand(text: str, axes: str, said: str) -> None:
    spec = GateSpec.parse(text)
    shape, _, _ = place(spec, axes)
    bare = GateShape(axes, {"c": 8}, shape.sources)
    with pytest.raises(ArgumentError) as error:
        spec.build(bare)
    assert said in str(error.value)


def test_sources_are_listed_in_order() -> None:
    spec = GateSpec(("pool(skip)", "branch", "cond(timestep)"), "mlp(8)", "channel")
    assert [str(ref) for ref in spec.sources] == ["skip", "branch", "cond(timestep)"]
    assert spec.mixes_tokens
    assert not GateSpec("hidden").mixes_tokens
    with pytest.raises(ArgumentError, match="number of sources"):
        spec.build(GateShape("bnc", {"c": 8}, (SourceShape("bnc", 4),)))
