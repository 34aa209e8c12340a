"""Exits along depth: each sample leaves at the first exit that is sure of it, and what follows runs for the others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.passes.exit.exit import Exit
from gatecc.train import exit_logits, exits

D, LAYERS = 8, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 16), nn.Linear(16, D)

    def forward(self, x: Tensor, mask: Tensor, shift: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.qkv(x) + shift[:, None]).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, n, D))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """Its blocks read a mask and a shift per sample, so that a sample that goes on must bring its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.shift, self.norm, self.head = nn.Linear(3, 3 * D), nn.LayerNorm(D), nn.Linear(D, 5)

    def tail(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).mean(1))

    def forward(self, x: Tensor, keep: Tensor, kind: Tensor) -> Tensor:
        mask, shift = keep[:, None, None, :], self.shift(kind)
        for layer in self.layers:
            x = layer(x, mask, shift)
        return self.tail(x)


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    net: Any = Net().eval()
    for layer in net.layers:
        nn.init.normal_(layer.down.weight, std=1.0)
    return net


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    keep = torch.ones(6, 7, dtype=torch.bool)
    keep[1, 3:] = keep[4, :2] = False
    return {"x": torch.randn(6, 7, D), "keep": keep, "kind": torch.randn(6, 3)}


@pytest.fixture(scope="module")
def leaving(net: Any, inputs: Any) -> Any:
    """Exits at three blocks, thresholds between the scores of samples, so that some leave at each."""
    torch.manual_seed(3)
    made: Any = gatecc.transform(net, Exit("block[:-1]", "pooled(max)"), inputs)
    with torch.no_grad():
        assert torch.equal(made(**inputs), net(**inputs))  # so it starts: nobody leaves
        here = torch.ones(6, dtype=torch.bool)
        for rule, z in zip(exits(made), exit_logits(made, inputs), strict=False):
            score = z.softmax(-1).amax(-1)
            rule.threshold.fill_(float(score[here].sort().values[-2:].mean()))
            here = here & (score < rule.threshold)
    return made


def by_hand(net: Any, made: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[int]]:
    """One sample at a time; and how many blocks each runs."""
    rows, depth = list[Tensor](), list[int]()
    shift = net.shift(inputs["kind"])
    for i, one in enumerate(inputs["x"]):
        x, z, at = one[None], one, 0
        for at, layer in enumerate(net.layers):
            x = layer(x, inputs["keep"][i : i + 1, None, None], shift[i : i + 1])
            if at == LAYERS - 1:
                z = net.tail(x)
                break
            head = made.layers[at].exit_head
            z = head.out(head.norm(x.amax(1)))
            if float(z.softmax(-1).max()) >= float(made.layers[at].exit.threshold):
                break
        rows.append(z)
        depth.append(at + 1)
    return torch.cat(rows), depth


@torch.no_grad()
def test_each_sample_leaves_by_itself(net: Any, leaving: Any, inputs: Any) -> None:
    expected, depth = by_hand(net, leaving, inputs)
    assert set(depth) == {1, 2, 3, 4}
    assert torch.allclose(leaving(**inputs), expected, atol=1e-5)
    for i in range(6):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        assert torch.allclose(leaving(**one), expected[i : i + 1], atol=1e-5)


@torch.no_grad()
def test_what_follows_runs_for_who_goes_on(net: Any, leaving: Any, inputs: Any) -> None:
    _, depth = by_hand(net, leaving, inputs)
    block = 2 * 7 * D * (3 * D + D + 2 * 16) + 2 * 2 * 7 * 7 * D
    head = 2 * D * 5
    heads = sum(min(d, LAYERS - 1) for d in depth) + depth.count(LAYERS)  # an exit's at each block, the model's own
    expected = 6 * 2 * 3 * 3 * D + sum(depth) * block + heads * head
    assert counted(lambda: leaving(**inputs))[1] == expected
    assert gatecc.inspect(leaving, inputs).totals.flops_before == expected


@torch.no_grad()
def test_all_none_and_no_samples(net: Any, leaving: Any, inputs: Any) -> None:
    made = copy.deepcopy(leaving)
    rules = exits(made)
    for rule in rules:
        rule.threshold.fill_(1.5)
    assert torch.equal(made(**inputs), net(**inputs))
    rules[1].threshold.fill_(0.0)  # everyone leaves there: nothing is left for the blocks behind
    early = exit_logits(made, inputs)
    assert torch.equal(made(**inputs), early[1])
    assert counted(lambda: made(**inputs))[1] < 0.55 * counted(lambda: net(**inputs))[1]
    nothing = {name: value[:0] for name, value in inputs.items()}
    assert made(**nothing).shape == (0, 5)
    made.layers[1].exit_head.out.bias.fill_(float("nan"))  # who is sure of nothing goes on
    assert torch.equal(made(**inputs), net(**inputs))


def test_masked_is_skipped_in_values_and_gradients(leaving: Any, inputs: Any) -> None:
    masked = torch.export.export(leaving, (), inputs, strict=False).module()
    compiled = torch.compile(leaving, backend="eager", fullgraph=True)
    given = {**inputs, "x": inputs["x"].clone().requires_grad_()}
    read = [given["x"], *leaving.parameters()]
    outputs = [model(**given) for model in (leaving, masked, compiled)]
    assert all(torch.allclose(outputs[0], y, atol=1e-5) for y in outputs[1:])
    skip, mask = (torch.autograd.grad(y.square().sum(), read, allow_unused=True) for y in (outputs[0], outputs[2]))
    for a, b in zip(skip, mask, strict=True):
        assert torch.allclose(torch.zeros(()) if a is None else a, torch.zeros(()) if b is None else b, atol=1e-4)


@torch.no_grad()
def test_exits_may_come_one_after_the_other(net: Any, leaving: Any, inputs: Any, tmp_path: Any) -> None:
    later = gatecc.transform(net, Exit("block[2]", "pooled(max)"), inputs)
    both: Any = gatecc.transform(later, Exit("block[0,1]", "pooled(max)"), inputs)
    both.load_state_dict(leaving.state_dict())
    assert torch.equal(both(**inputs), leaving(**inputs))
    gatecc.save(both, tmp_path / "m")
    assert torch.equal(gatecc.load(net, tmp_path / "m")(**inputs), leaving(**inputs))
    assert torch.equal(gatecc.revert(both)(**inputs), net(**inputs))


@torch.no_grad()
def test_the_models_own_head(net: Any, inputs: Any) -> None:
    own: Any = gatecc.transform(net, Exit("block[1]", "tail"), inputs)
    shared = gatecc.transform(net, Exit("block[1]", "tail(shared=True)"), inputs)
    shift, mask = net.shift(inputs["kind"]), inputs["keep"][:, None, None]
    x = net.layers[1](net.layers[0](inputs["x"], mask, shift), mask, shift)
    for made in (own, shared):
        early, final = exit_logits(made, inputs)
        assert torch.allclose(early, net.tail(x), atol=1e-6)
        assert torch.equal(final, net(**inputs))
    own.layers[1].exit_head.head.bias.add_(1.0)
    assert torch.equal(exit_logits(own, inputs)[1], net(**inputs))
    assert torch.allclose(exit_logits(own, inputs)[0], net.tail(x) + 1, atol=1e-6)
    assert len(list(shared.parameters())) == len(list(net.parameters()))


def test_exported_the_rest_runs_if_a_sample_goes_on(net: Any, leaving: Any, inputs: Any, tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    from tests.export.profile import profile

    written = gatecc.export(leaving, tmp_path / "m", inputs)  # compared in ONNX Runtime at several sizes
    assert any("one of them takes it" in note for note in written.notes)
    for rows in ([0], [1], [2], [3], [4], [5], [0, 1, 2]):
        some = {name: x[rows] for name, x in inputs.items()}
        with torch.no_grad():
            expected, depth = by_hand(net, leaving, some)
        (y,), counts = profile(tmp_path / "m" / "model.onnx", {n: x.numpy() for n, x in some.items()}, tmp_path)
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4)
        norms = sum(count for kind, count in counts.items() if kind.endswith("LayerNormalization"))
        deepest = max(depth)
        assert norms == deepest + min(deepest, LAYERS - 1) + (deepest == LAYERS)  # of blocks, exits, and the model's


class Tokens(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(D, 5)
        self.inside = inside

    def forward(self, x: Tensor, keep: Tensor, shift: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, keep[:, None, None], shift)
        return (self.head(x.mean(1)), x) if self.inside else self.head(x)


def test_refused_by_name(net: Any, inputs: Any) -> None:
    given = (inputs["x"], inputs["keep"], torch.randn(6, 3 * D))
    with pytest.raises(SiteRefusedError, match=r"the mask of .* is "):  # tokens see later ones
        gatecc.transform(Tokens(False).eval(), Exit("block[0]"), given)
    with pytest.raises(SiteRefusedError, match="one row for each sample"):
        gatecc.transform(net, Exit("block[0]", "pooled(each)"), inputs)
    with pytest.raises(SiteRefusedError, match="cannot be skipped for some samples"):
        gatecc.transform(Tokens(True).eval(), Exit("block[0]"), given)
    for other, remedy in (("step[...]", "merge='confident'"), ("mlp[0]", "the blocks around it")):
        with pytest.raises(ArgumentError, match=remedy):
            Exit(other)
    with pytest.raises(ArgumentError, match="no rule"):
        Exit("block[0]", rule="sometimes")
    with pytest.raises(ArgumentError, match="no head"):
        Exit("block[0]", head="none")
