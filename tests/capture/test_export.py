"""capture: a flat program of live parameters, with owners, calls, lines, guards; and the reasons of a refusal."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from gatecc.capture import capture
from gatecc.capture.adapters import adapted
from gatecc.capture.guards import compile_guards
from gatecc.capture.reads import reads_of, recorded_reads, same_reads
from gatecc.capture.record import record_calls
from gatecc.errors import CaptureError
from gatecc.ir.program import Program, origin


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.factor = 2.0
        self.unused = "x"

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.register_buffer("shift", torch.ones(4), persistent=False)

    def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0, **more: Any) -> dict[str, Tensor]:
        y = self.inner(self.inner(x)) + self.get_buffer("shift")
        for other in rest:
            y = y + other
        return {"y": y * scale + more.get("extra", 0.0)}


X = torch.randn(3, 4)


def run(program: Program, *leaves: Tensor) -> Any:
    """Interpret a program's graph on the live module."""
    holder = fx.GraphModule(program.module, program.graph)
    for name, value in program.constants.items():
        setattr(holder, name, value)
    return fx.Interpreter(holder).run(*leaves)


def test_nested_arguments_constants_and_live_parameters() -> None:
    model = Outer()
    program = capture(model, (X, X, 2 * X), {"scale": 3.0, "extra": X})
    assert [n.name for n in program.placeholders] == ["x", "arg1", "arg2", "extra"] or len(program.placeholders) == 4
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    assert {"inner.linear.weight", "inner.linear.bias", "shift"} <= names
    assert not program.constants
    assert all(program.weight(n) is not None for n in program.graph.nodes if n.op == "get_attr")
    (y,) = run(program, X, X, 2 * X, X)
    assert torch.allclose(y, model(X, X, 2 * X, scale=3.0, extra=X)["y"])


def test_owners_calls_and_lines() -> None:
    program = capture(Outer(), (X,), fqn="root")
    linears = [n for n in program.calls() if n.target is torch.ops.aten.linear.default]
    assert [origin(n).owner for n in linears] == ["root.inner.linear"] * 2
    assert [origin(n).call for n in linears] == [0, 1]
    assert all(origin(n).line.startswith("test_export.py:") for n in linears)


def test_guards_hold_for_other_sizes_and_not_for_others() -> None:
    check = compile_guards(capture(Outer(), (X, X)).guards)
    assert check([torch.zeros(7, 4), torch.zeros(7, 4)])
    assert not check([torch.zeros(7, 5), torch.zeros(7, 5)])
    assert not check([torch.zeros(7, 4), torch.zeros(6, 4)])


def test_one_tensor_passed_twice_is_two_inputs() -> None:
    class Cross(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return q @ k.transpose(0, 1)

    program = capture(Cross(), (X, X))
    assert compile_guards(program.guards)([torch.zeros(7, 4), torch.zeros(5, 4)])
    (scores,) = run(program, torch.ones(7, 4), torch.ones(5, 4))
    assert scores.shape == (7, 5)


def test_static_capture() -> None:
    check = compile_guards(capture(Outer(), (X,), dynamic="none").guards)
    assert check([X])
    assert not check([torch.zeros(5, 4)])


def test_reads_are_those_that_the_forward_made() -> None:
    model = Inner()
    with recorded_reads(model) as seen:
        model(X)
    reads = reads_of(seen)
    assert ("", "factor", 2.0) in [read[:3] for read in reads]
    assert not [r for r in reads if r.name == "unused"]
    assert type(model) is Inner
    other = Inner()
    assert same_reads(reads, other)
    other.factor = 3.0
    assert not same_reads(reads, other)


def test_a_refusal_says_why_and_where() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError) as caught:
        capture(Branch(), (X,), fqn="head")
    assert caught.value.where == "head"
    assert caught.value.found
    assert caught.value.do


def test_recorded_calls_are_copies() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    model = nn.Sequential(Doubling(), Doubling())
    calls, output = record_calls(model, ["0", "1"], (torch.ones(2),), {})
    assert [c.args[0].tolist() for c in (*calls["0"], *calls["1"])] == [[1, 1], [2, 2]]
    assert output.tolist() == [4, 4]
    assert not model[0]._forward_pre_hooks


def test_adapters_are_undone() -> None:
    class Config:
        use_cache = True

    model = nn.Linear(2, 2)
    config = Config()
    config.use_cache = True
    vars(model)["config"] = config
    before = torch.backends.mha.get_fastpath_enabled()
    with adapted(model):
        assert config.use_cache is False
        assert not torch.backends.mha.get_fastpath_enabled()
    assert config.use_cache is True
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_an_image_keeps_its_size_and_other_tensors_do_not() -> None:
    """Height and width are fixed where a convolution reads as many channels; heads by tokens are no image."""
    image = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (torch.randn(2, 3, 8, 8),))
    queries = capture(nn.Softmax(-1), (torch.randn(2, 3, 8, 8),))
    free = [[isinstance(s, torch.SymInt) for s in p.placeholders[0].meta["val"].shape[2:]] for p in (image, queries)]
    assert free == [[False, False], [True, True]]


def test_example_inputs_in_every_form() -> None:
    x, other = torch.randn(2, 4), torch.randn(2, 4)
    forms = ((x, other), ((x, other), {}), ((x,), {"other": other}), {"x": x, "other": other})
    shown = {tuple(n.name for n in capture(Add(), form).placeholders) for form in forms}
    assert shown == {("x", "other")}


class Add(nn.Module):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + other


def test_a_capture_that_fails_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    class Decides(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    capture(nn.Linear(4, 4), (torch.randn(2, 4),))  # pytest shows what torch notes of its first trace in a process
    capfd.readouterr()
    with pytest.raises(CaptureError, match=r"data-dependent.*\(test_export.py:\d+: torch.Tensor.__bool__\)"):
        capture(Decides(), (torch.randn(2, 4),))
    assert capfd.readouterr() == ("", "")


def test_a_model_that_breaks_while_it_is_captured_is_told_by_its_line() -> None:
    """As those of transformers do that leave a mask out where they are traced: the message itself names no line."""

    class Tells(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask: Any = None if torch.compiler.is_exporting() else x
            return x * mask[:, None]

    line = Tells.forward.__code__.co_firstlineno + 2
    with pytest.raises(CaptureError, match=rf"'NoneType' object is not subscriptable \(test_export.py:{line}\)"):
        capture(Tells(), (torch.randn(2, 4),))


class Aliased(nn.Module):
    """Layers that are called through a slice, one of which has another name too."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.alias = self.body.layers[3]
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        layers: Any = self.body.layers
        for layer in layers[1:][self.part]:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("part", "layers"), [(slice(None, -1), (1, 2)), (slice(None, None, 2), (1, 3)), (slice(-2, None), (2, 3))]
)
def test_layers_of_a_slice_have_their_own_names(part: slice, layers: tuple[int, ...]) -> None:
    program = capture(nn.Sequential(Aliased(part)), (torch.randn(2, 4),))
    owners = [origin(n).owner for n in program.calls() if "linear" in str(n.target)]
    assert owners == [f"0.body.layers.{i}" for i in layers]


def test_packed_weights_are_named() -> None:
    """torch's own reason names a class of TorchScript and none of the model."""
    model = nn.Sequential(nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})  # pyright: ignore[reportDeprecated]
    with pytest.raises(CaptureError, match=r"found +0 holds its weights packed.*torchao"):
        capture(quantised, (torch.ones(2, 4),))
