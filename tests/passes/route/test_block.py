"""Blocks as experts: each sample takes some of them, or none, and what it does not take does not run for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.capture import capture
from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError, GateccError, SiteRefusedError
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.route import Route
from gatecc.pipeline import apply, prepare
from gatecc.scope.scope import plain
from tests.graphs import run

ONE = "softmax_topk(1, straight=True)"
D = 8


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
    """Its blocks read a mask and a shift per sample, so that a sample that runs beside others must bring its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.shift, self.head = nn.Linear(3, 3 * D), nn.Linear(D, 5)

    def forward(self, x: Tensor, keep: Tensor, kind: Tensor) -> Tensor:
        mask, shift = keep[:, None, None, :], self.shift(kind)
        for layer in self.layers:
            x = layer(x, mask, shift)
        return self.head(x)


def route(experts: str, choice: str = ONE, init: str = "random(std=1)", source: str = "pool(in)", **how: Any) -> Route:
    return Route("block[...]", RouterSpec(source, "linear(bias=False)", choice, init), experts, **how)


def noised(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "router" in name or "experts" in name:
                p.add_(torch.randn(p.shape) * 0.5)
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    keep = torch.ones(6, 7, dtype=torch.bool)
    keep[1, 3:] = keep[4, :2] = False
    return {"x": torch.randn(6, 7, D), "keep": keep, "kind": torch.randn(6, 3)}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def skipping(net: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return noised(gatecc.transform(net, route("copies(1)", init="zero", skip=True), inputs, verify=False))


@pytest.fixture(scope="module")
def mixing(net: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    torch.manual_seed(1)
    return noised(gatecc.transform(net, route("copies(2)", "softmax_topk(2)", skip=True), inputs, verify=False))


def by_hand(net: Any, routed: Any, inputs: dict[str, Tensor], k: int) -> tuple[Tensor, list[list[int]]]:
    """One sample at a time, with modules of the model itself; and which options each layer's samples took."""
    x, taken = inputs["x"], list[list[int]]()
    shift = net.shift(inputs["kind"])
    for own, layer in zip(net.layers, routed.layers, strict=True):
        experts = [own]
        for weights in getattr(layer, "experts", nn.ModuleDict()).values():
            other = Layer().eval()
            other.load_state_dict(weights.state_dict())
            experts.append(other)
        rows, of_layer = [], list[int]()
        for i, one in enumerate(x):
            top = (layer.router.weight @ one.mean(0)).topk(k)
            y = torch.zeros_like(one)
            for weight, e in zip(top.values.softmax(0), top.indices.tolist(), strict=True):
                of_layer.append(e)
                mask = inputs["keep"][i : i + 1, None, None]
                y = y + weight * (experts[e](one[None], mask, shift[i : i + 1])[0] if e < len(experts) else one)
            rows.append(y)
        x = torch.stack(rows)
        taken.append(of_layer)
    return net.head(x), taken


def test_the_block_or_nothing_is_what_each_sample_alone_gives(net: Any, skipping: Any, inputs: Any) -> None:
    with torch.no_grad():
        expected, taken = by_hand(net, skipping, inputs, 1)
        assert torch.allclose(skipping(**inputs), expected, atol=1e-5)
        assert any(0 < sum(t) < len(t) for t in taken)  # in some layer samples part
        for i in (0, 1):  # alone, a sample takes the same way
            one = {name: value[i : i + 1] for name, value in inputs.items()}
            assert torch.allclose(skipping(**one), expected[i : i + 1], atol=1e-5)


def test_copies_and_nothing_are_weighted(net: Any, mixing: Any, inputs: Any) -> None:
    names = {n for n, _ in mixing.layers[1].named_parameters() if n not in dict(net.layers[1].named_parameters())}
    assert names == {"router.weight", *(f"experts.1.{n}" for n, _ in net.layers[1].named_parameters())}
    with torch.no_grad():
        expected, taken = by_hand(net, mixing, inputs, 2)
        assert {e for t in taken for e in t} == {0, 1, 2}
        assert torch.allclose(mixing(**inputs), expected, atol=1e-5)


def test_what_a_sample_does_not_take_is_not_computed(net: Any, mixing: Any, skipping: Any, inputs: Any) -> None:
    x = inputs["x"]
    n = x.size(1)
    block = 2 * n * D * (3 * D + D + 2 * 16) + 2 * 2 * n * n * D  # of one sample: four products, scores and their sums
    rest = 6 * (2 * 3 * 3 * D + 2 * n * D * 5)
    for model, k, options in ((skipping, 1, 2), (mixing, 2, 3)):
        with torch.no_grad():
            _, taken = by_hand(net, model, inputs, k)
        runs = sum(e < options - 1 for of_layer in taken for e in of_layer)
        router = 2 * 6 * 2 * D * options
        assert counted(lambda model=model: model(**inputs))[1] == rest + router + runs * block
        if options == 2:
            totals = gatecc.inspect(model, inputs).totals
            own = sum(p.numel() for n, p in model.layers[0].named_parameters() if "router" not in n)
            assert totals.flops_before == rest + router + runs * block
            assert totals.active_before == sum(p.numel() for p in model.parameters()) - round(own * (2 - runs / 6))
    nobody: Any = copy.deepcopy(skipping)
    with torch.no_grad():
        for layer in nobody.layers:
            layer.router.weight.copy_(torch.stack([-x[0].mean(0), x[0].mean(0)]))
    alike = {**inputs, "x": x[:1].expand_as(x)}
    assert counted(lambda: nobody(**alike))[1] == rest + 2 * 6 * 2 * D * 2


def test_masked_is_skipped_in_values_and_gradients(mixing: nn.Module, inputs: dict[str, Tensor]) -> None:
    masked = torch.export.export(mixing, (), inputs, strict=False).module()
    compiled = torch.compile(mixing, backend="eager", fullgraph=True)
    given = {**inputs, "x": inputs["x"].clone().requires_grad_()}
    weights = dict(mixing.named_parameters())
    outputs = [model(**given) for model in (mixing, masked, compiled)]
    read = [given["x"], *(p for n, p in weights.items() if "layers" in n)]
    skip, *others = [torch.autograd.grad(y.square().sum(), read) for y in (outputs[0], outputs[2])]
    assert all(torch.allclose(outputs[0], y, atol=1e-5) for y in outputs[1:])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for of in others for a, b in zip(skip, of, strict=True))
    assert float(skip[[n for n in weights if "layers" in n].index("layers.0.router.weight") + 1].abs().max()) > 0


@pytest.mark.parametrize(
    ("experts", "choice", "init", "skip", "exact"),
    [
        ("copies(3)", "softmax_topk(2)", "random(std=3)", False, True),
        ("copies(1)", ONE, "zero", True, True),
        ("copies(2)", "softmax_topk(2)", "zero", True, True),
        ("copies(1)", ONE, "random(std=3)", True, False),
        ("copies(2)", "softmax_topk(2, renorm=False)", "zero", False, True),
        ("copies(4)", "softmax_topk(2, renorm=False)", "zero", False, False),
        ("copies(2, noise=0.1)", "softmax_topk(2)", "zero", False, False),
    ],
)
def test_it_says_whether_it_starts_as_the_blocks(
    net: Any, inputs: Any, experts: str, choice: str, init: str, skip: bool, exact: bool
) -> None:
    torch.manual_seed(0)
    wanted = route(experts, choice, init, skip=skip)
    assert wanted.contract().kind == ("identity_at_init" if exact else "changes_function")
    program = capture(copy.deepcopy(net), (), inputs)
    apply(prepare(program), [wanted])
    with torch.no_grad():
        same = float((run(program)[0] - net(**inputs)).abs().max()) < 1e-6
    assert same == exact


def test_other_rewrites_inside_come_along(net: Any, inputs: Any) -> None:
    gate = gatecc.Gate("attention[...].heads", gatecc.GateSpec("self", granularity="head"))
    torch.manual_seed(0)
    made: Any = noised(gatecc.transform(net, [gate, route("copies(2)", skip=True)], inputs, verify=False))
    assert "experts.1.gate.weight" in dict(made.layers[0].named_parameters())
    masked = torch.export.export(made, (), inputs, strict=False).module()
    with torch.no_grad():
        assert torch.allclose(made(**inputs), masked(**inputs), atol=1e-5)
    assert torch.equal(gatecc.revert(made)(**inputs), net(**inputs))


def test_saved_and_loaded(net: Any, mixing: Any, inputs: Any, tmp_path: Any) -> None:
    gatecc.save(mixing, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(gatecc.load(net, tmp_path / "m")(**inputs), mixing(**inputs))
        with plain(mixing):
            assert torch.equal(mixing(**inputs), net(**inputs))


class Noisy(nn.Module):
    """Convolutions with running statistics, as in SkipNet."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.block(), self.block()])

    @staticmethod
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_running_statistics_see_all_samples_in_training() -> None:
    torch.manual_seed(0)
    net: Any = Noisy().eval()
    x = torch.randn(5, 4, 6, 6)
    made: Any = noised(gatecc.transform(net, route("copies(1)", init="zero", skip=True), (x,), verify=False))
    made.train()(x).sum().backward()
    net.train()(x)
    assert torch.allclose(made.blocks[0][1].running_mean, net.blocks[0][1].running_mean)
    made.eval()
    flops = counted(lambda: made(x))[1]
    assert flops < counted(lambda: net(x))[1]


def test_refused_by_name(net: Any, inputs: Any) -> None:
    for experts, how in (("split(4)", {}), ("copies(2, keep=0.5)", {}), ("drop(2)", {})):
        with pytest.raises(ArgumentError, match="no neurons to divide"):
            route(experts, **how)
    with pytest.raises(ArgumentError, match=r"pool\(in\)"):
        gatecc.transform(net, route("copies(2)", source="in"), inputs)
    spec = RouterSpec("pool(in)", mask="keep")
    with pytest.raises(ArgumentError, match="no tokens to mask"):
        gatecc.transform(net, Route("block[...]", spec, "copies(2)"), inputs)


class Telling(nn.Module):
    """Returns what a block is computed from."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, keep: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        inside = x
        for layer in self.layers:
            x, inside = layer(x, keep, kind)
        return x, inside


class Open(Layer):
    def forward(self, x: Tensor, mask: Tensor, shift: Tensor) -> Any:
        hidden = self.up(x)
        return x + self.down(F.gelu(hidden)), hidden.softmax(-1)


def test_a_block_whose_inside_is_read_is_refused(inputs: Any) -> None:
    open_net = Telling(nn.ModuleList([Open(), Open()])).eval()
    with pytest.raises(SiteRefusedError, match="is read by"):
        gatecc.transform(open_net, route("copies(1)", skip=True), inputs)


class Between(Layer):
    """Attention between the samples of a batch, as in SAINT."""

    def forward(self, x: Tensor, mask: Tensor, shift: Tensor) -> Tensor:
        q, k, v = self.qkv(x).transpose(0, 1).chunk(3, -1)
        return x + self.down(F.gelu(self.up(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))))


class Centred(Layer):
    def forward(self, x: Tensor, mask: Tensor, shift: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x - x.mean(0, keepdim=True))))


class Apart(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, keep: Tensor, kind: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, keep, kind)
        return x


@pytest.mark.parametrize("kind", [Between, Centred])
def test_a_block_in_which_samples_meet_is_refused(kind: Any, inputs: Any) -> None:
    with pytest.raises(SiteRefusedError, match="computes samples from one another"):
        gatecc.transform(Apart(kind(), kind()).eval(), route("copies(1)", skip=True), inputs)


class Speaking(nn.Module):
    """A causal model with a task per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tasks, self.head = nn.Embedding(11, D), nn.Linear(3, D), nn.Linear(D, 11)
        self.layers = nn.ModuleList([Causal(), Causal()])

    def forward(self, ids: Tensor, task: Tensor) -> Tensor:
        x = self.embed(ids) + self.tasks(task)[:, None]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(heads.transpose(1, 2).reshape(b, n, D))


def test_a_sample_that_keeps_its_way_can_be_decoded() -> None:
    torch.manual_seed(0)
    inputs = {"ids": torch.randint(0, 11, (4, 6)), "task": torch.randn(4, 3)}
    speaking = Speaking().eval()
    by_task = route("copies(1)", init="zero", source="cond(task)", skip=True)
    made = noised(gatecc.transform(speaking, by_task, inputs, verify=False))
    gatecc.decoder(made, inputs)  # compared with the full forward
    pooled = gatecc.transform(speaking, route("copies(1)", init="zero", skip=True), inputs, verify=False)
    with pytest.raises(GateccError, match="mixes positions"):
        gatecc.decoder(pooled, inputs)


def test_exported_a_block_runs_if_a_sample_takes_it(net: Any, mixing: Any, inputs: Any, tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    from tests.export.profile import profile

    written = gatecc.export(mixing, tmp_path / "m", inputs)  # compared in ONNX Runtime at several sizes
    assert any("if one of them takes it" in note for note in written.notes)
    assert written.operators["If"] == 2 * 2  # a block and its copy in both layers
    for row in range(3):
        one = {name: x[row : row + 1] for name, x in inputs.items()}
        expected, taken = by_hand(net, mixing, one, 2)
        feeds = {name: x.numpy() for name, x in one.items()}
        (y,), counts = profile(tmp_path / "m" / "model.onnx", feeds, tmp_path)
        torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-4)
        ran = sum(count for kind, count in counts.items() if kind.endswith("LayerNormalization"))
        assert ran == sum(e < 2 for of_layer in taken for e in of_layer) < 4
