"""spelled-attention: every spelling becomes the fused operator with the same numbers and gradients, or stays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc import backend
from gatecc.passes.lower import Outcome, spelled_attention
from tests.zoo import handwritten
from tests.zoo.tower import HEADS, WIDTH, Attention, D, later

Made = tuple[list[Outcome], list[fx.GraphModule]]


@pytest.fixture(autouse=True)
def short_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias is lowered at any length, so that small models show it."""
    monkeypatch.setattr(spelled_attention, "SHORT", 0)
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> tuple[Callable[..., Any], Made]:
    """A function that runs lowered, and what was made of it."""
    made: Made = ([], [])

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        lowered = backend.lower(graph_module, example)
        assert not lowered.faults
        made[0].extend(o for o in lowered.outcomes if o.lowering == "spelled-attention")
        made[1].append(lowered.graph)
        return lowered.graph.forward

    return torch.compile(function, backend=spy, dynamic=dynamic), made


def fused(made: Made) -> list[fx.Node]:
    graph = made[1][-1].graph
    return graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def values(output: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradients of something that all its elements matter to."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), parameters, allow_unused=True)]


def check(model: nn.Module, *args: Tensor, training: bool = True, tolerance: float = 1e-9) -> Made:
    """Compile a model of float64 and compare its output, and its gradients in training."""
    function, made = compiled(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(function(*args), model(*args), rtol=1e-9, atol=1e-11)
        return made
    found, expected = values(function(*args), parameters), values(model(*args), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance)
    return made


CAUSAL = "ScaleBefore Additive MaskThenScale Where InPlace Bmm GroupedExpand GroupedRepeat ManualSoftmax Rope".split()
BARE = "ScaleBoth Einsum SwappedValues SwappedScores GroupedEinsum MultiQuery SingleHead ManualReciprocal LogSoftmax"


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_is_said(name: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float32 if name == "Bmm" else torch.float64  # its mask is of the default dtype
    tolerance = 1e-6 if name in ("Where", "Bmm") else 1e-9  # the softmax of Where is of float32, too
    model = getattr(handwritten, name)().to(dtype).eval()
    made = check(model, inputs(2, 7, D).to(dtype), tolerance=tolerance)
    (call,) = fused(made)
    assert call.args[3:6] == (None, 0.0, True)
    assert_heads(call, name)
    assert made[0][0].became == "fused attention, is_causal=True"


@pytest.mark.parametrize("name", [*BARE.split(), "FusedIndex"])
def test_without_a_mask(name: str) -> None:
    torch.manual_seed(0)
    made = check(getattr(handwritten, name)().double().eval(), inputs(2, 7, D))
    (call,) = fused(made)
    assert len(call.args) == 3
    assert_heads(call, name)


def assert_heads(call: fx.Node, name: str) -> None:
    """Heads that queries share are not repeated."""
    if name.startswith("Grouped"):
        query, key = (n.meta["val"] for n in call.args[:2] if isinstance(n, fx.Node))
        assert (query.shape[1], key.shape[1]) == (HEADS, 2)
        assert call.kwargs["enable_gqa"] is True


@pytest.mark.parametrize("name", ["Alibi", "Sliding", "RelativeBias", "RelativeKeys"])
def test_a_mask_that_says_more_stays_a_tensor(name: str) -> None:
    torch.manual_seed(0)
    made = check(getattr(handwritten, name)().double().eval(), inputs(2, 9, D), training=False)
    (call,) = fused(made)
    assert isinstance(call.args[3], fx.Node)
    assert call.args[5:] in ((), (False,))


class Windows(Attention):
    """Swin: windows are taken apart for their own mask, on scores of which they are samples; a learned bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 4, 4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, _ = x.shape
        x = x.view(b * (n // 4), 4, D)
        q, k, v = (p(x).view(-1, 4, HEADS, WIDTH).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.mT / 4 + self.bias
        apart = torch.arange(n // 4)[:, None, None] * torch.eye(4, dtype=x.dtype) * -100.0
        scores = (scores.view(b, n // 4, HEADS, 4, 4) + apart[None, :, None]).view(-1, HEADS, 4, 4)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, D))


class Temperature(Attention):
    """Swin 2: each head divides its scores by a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return (q @ k.mT / self.temperature.exp()).softmax(-1) @ v


class Reshaped(Attention):
    """SAM: a bias takes its shape from the scores."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q @ k.mT).flatten(0, 1)
        row = torch.arange(q.shape[2] // 2, dtype=q.dtype)
        near = -(row[:, None, None, None] - row[:, None]).abs().expand(-1, 2, -1, 2)
        scores = scores + near.expand(scores.shape[0], -1, -1, -1, -1).reshape_as(scores)
        return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (-1, HEADS))


@pytest.mark.parametrize("model", [Windows, Reshaped])
def test_views_of_the_scores(model: type[Attention]) -> None:
    made = check(model().double(), inputs(2, 8, D), training=False)
    assert made[0][0].became == "fused attention, with a mask"


def test_a_factor_per_head_goes_to_the_queries() -> None:
    made = check(Temperature().double(), inputs(2, 5, D))
    assert made[0][0].became == "fused attention, without a mask"


class Filled(Attention):
    """Keys that an input hides get ``fill``; ``after`` the softmax, too."""

    def __init__(self, fill: float, after: bool = False) -> None:
        super().__init__()
        self.fill, self.after = fill, after

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        hidden = mask[:, None, None] == 0
        weights = (q @ k.mT / 4).masked_fill(hidden, self.fill).softmax(-1)
        return (weights.masked_fill(hidden, 0.0) if self.after else weights) @ v


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fill", [-math.inf, -1e9])
def test_queries_that_see_no_key(fill: float, after: bool) -> None:
    """NaN, the mean of all values, or zeros: as they were."""
    mask = torch.ones(3, 6)
    mask[1], mask[2, 4:] = 0, 0
    model, x = Filled(fill, after).eval(), inputs(3, 6, D).float()
    function, made = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(function(x, mask), model(x, mask), equal_nan=True, rtol=1e-4, atol=1e-5)
    assert made[0][0].became
    torch._dynamo.reset()
    function, made = compiled(model)
    function(x, mask)  # with gradients
    assert bool(made[0][0].became) == (after or fill == -math.inf)


def test_a_mean_over_all_values_stays_that_in_half_precision() -> None:
    mask = torch.zeros(2, 5)
    model, x = Filled(-1e9).eval().bfloat16(), inputs(2, 5, D).bfloat16()
    function, made = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(function(x, mask), model(x, mask), rtol=2e-2, atol=2e-2)
    assert made[0][0].became


class Dropped(Attention):
    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.dropout((q @ k.mT / 4).softmax(-1), 0.25, self.training) @ v


def test_dropout_stays_on_the_cpu_and_keeps_its_probability_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    function, made = compiled(Dropped())
    function(inputs(2, 5, D).float())
    assert made[0][0].reason == "the fused operator of the CPU has no dropout"
    monkeypatch.setattr(spelled_attention, "_unprofitable", lambda *_: "")  # as on a GPU
    torch._dynamo.reset()
    model, x = Dropped(), inputs(1, 5, D).float()
    function, made = compiled(model)
    torch.manual_seed(0)
    mean = torch.stack([function(x) for _ in range(200)]).mean(0)
    (call,) = fused(made)
    assert call.args[4] == 0.25
    assert (mean - model.eval()(x)).abs().max() < 0.15


class ReturnsWeights(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        weights = (self.q(x) @ self.k(x).mT).softmax(-1)
        return weights @ self.v(x), weights


class LooksCausal(Attention):
    """At up to 8 tokens, the mask is causal; beyond, a query sees the key 8 after it."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]
        return (q @ k.mT).masked_fill((ahead > 0) & (ahead != 8), -math.inf).softmax(-1) @ v


class Overwritten(Attention):
    """The queries change between the two products."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = q.clone()
        weights = (q @ k.mT).softmax(-1)
        q.zero_()
        return weights @ v + q


class ZeroTable(Attention):
    """A learned bias that is zero so far, and a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(HEADS, 32, 32))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        return (q @ k.mT + self.table[:, :n, :n]).masked_fill(later(n, n), -math.inf).softmax(-1) @ v


def test_weights_that_are_returned() -> None:
    model = ReturnsWeights().eval()
    function, made = compiled(model)
    x = inputs(2, 5, D).float()
    for one, other in zip(function(x), model(x), strict=True):
        assert torch.equal(one, other)
    assert made[0][0].reason == "the weights are also read by the caller"


def test_what_is_overwritten() -> None:
    made = check(Overwritten().double(), inputs(2, 5, D))
    assert "is written to in place before the values are weighed" in made[0][0].reason


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_mask_that_looks_causal_at_the_example_size(dynamic: bool) -> None:
    model = LooksCausal().double().eval()
    function, made = compiled(model, dynamic)
    with torch.no_grad():
        for length in (6, 12, 20):
            x = inputs(2, length, D)
            torch.testing.assert_close(function(x), model(x), rtol=1e-9, atol=1e-11)
    assert [o.became for o in made[0]][-1] == "fused attention, with a mask"


def test_a_bias_that_is_zero_so_far_is_no_mask_to_drop() -> None:
    model = ZeroTable().double().eval()
    function, made = compiled(model)
    x = inputs(2, 5, D)
    with torch.no_grad():
        function(x)
        model.table.normal_()
        torch.testing.assert_close(function(x), model(x), rtol=1e-9, atol=1e-11)
    assert made[0][0].became == "fused attention, with a mask"


@pytest.mark.parametrize("name", ["SoftCap", "Sink", "Multiplied"])
def test_what_the_fused_operator_cannot_say_stays(name: str) -> None:
    made = check(getattr(handwritten, name)().double().eval(), inputs(2, 5, D))
    assert made[0][0].reason
    assert not made[0][0].became


def test_sizes_that_change() -> None:
    """Six lengths and three batches, in two compilations."""
    model = handwritten.GroupedExpand().eval()
    function, made = compiled(model)
    with torch.no_grad():
        for length, batch in ((5, 2), (6, 3), (7, 4), (9, 2), (12, 3), (17, 4)):
            x = inputs(batch, length, D).float()
            torch.testing.assert_close(function(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(made[1]) <= 2
    assert all(o.became for o in made[0])


class Scaled(Attention):
    """The scale is a number of the module, which Dynamo hands over as an input where everything is dynamic."""

    scale = 0.3

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q @ k.mT * self.scale).masked_fill(later(q.shape[2], k.shape[2]), -math.inf)
        return scores.softmax(-1) @ v


def test_numbers_of_modules_that_are_inputs() -> None:
    model, x = Scaled().double(), inputs(2, 5, D)
    function, made = compiled(model, dynamic=True)
    with torch.no_grad():
        for scale in (0.3, 0.7):
            model.scale = scale
            torch.testing.assert_close(function(x), model(x), rtol=1e-9, atol=1e-11)
    assert {o.became for o in made[0]} == {"fused attention, is_causal=True"}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("around", [True, False])
def test_autocast(masked: bool, around: bool) -> None:
    """The fused operator runs in the precision of the products; no mask that needs more of it is handed over."""
    model, x, mask = Filled(-1e9).eval(), inputs(2, 9, D).float(), torch.ones(2, 9)
    mask[1] = 0

    def call(x: Tensor, mask: Tensor) -> Tensor:
        if around:
            return (model if masked else bare)(x, mask).float()
        with torch.autocast("cpu", torch.bfloat16):
            return (model if masked else bare)(x, mask).float()

    bare = handwritten.ScaleBoth().eval()
    function, made = compiled(call)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=around):
        torch.testing.assert_close(function(x, mask), call(x, mask), rtol=3e-2, atol=3e-2)
    assert bool(made[0][0].became) != masked


def one_for_each_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joined = torch.cat((q @ k.mT, q.sum(-1, keepdim=True)), -1)
    return joined.softmax(-1)[..., :-1] @ v


def another_column_is_cut_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joined = torch.cat((q @ k.mT, q.new_zeros(*q.shape[:3], 1)), -1)
    return joined.softmax(-1)[..., 1:] @ v


def weighs_a_row_of_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    joined = torch.cat((q @ k.mT, q.new_zeros(*q.shape[:3], 1)), -1)
    return joined.softmax(-1) @ torch.cat((v, v[:, :, :1]), 2)


JOINED = {
    "not the same for all queries": one_for_each_query,
    "the weights are changed by slice": another_column_is_cut_off,
    "not cut off": weighs_a_row_of_its_own,
}


@pytest.mark.parametrize("reason", JOINED)
def test_what_is_joined_to_the_scores(reason: str) -> None:
    function, made = compiled(JOINED[reason])
    q, k, v = inputs(3, 2, 4, 9, 8)
    torch.testing.assert_close(function(q, k, v), JOINED[reason](q, k, v))
    assert reason in made[0][0].reason
    assert not made[0][0].became
