"""canonicalize: one spelling for every call, and the same values and gradients, bit by bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from gatecc.capture import capture
from gatecc.ir.ops import opname
from gatecc.ir.program import META, Program
from gatecc.passes.canonicalize import canonicalize
from tests.graphs import run


def names(program: Program) -> list[str]:
    return [opname(n) or getattr(n.target, "__name__", "") for n in program.calls()]


def canonical(module: nn.Module, *inputs: Tensor) -> Program:
    program = capture(module, inputs)
    canonicalize(program)
    return program


def gradients(outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> list[Tensor | None]:
    total = torch.stack([out.float().pow(2).sum() for out in outputs if out.requires_grad]).sum()
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def assert_same(module: nn.Module, program: Program, *inputs: Tensor) -> None:
    """The program yields what the module yields, and the same gradients to parameters and inputs."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted = [*module.parameters(), *(x for x in leaves if x.requires_grad)]
    expected = module(*leaves)
    expected = expected if isinstance(expected, tuple) else (expected,)
    got = run(program, *leaves)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients(got, wanted), gradients(expected, wanted), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)  # pyright: ignore[reportArgumentType]


class Spellings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.add(input=self.linear(x), other=x, alpha=1)
        y = torch.softmax(y, dim=-1) + F.softmax(y, -1, dtype=torch.float32)
        return torch.add(y, x, alpha=2).transpose(1, 0)


def test_arguments_have_one_spelling() -> None:
    model, x = Spellings(), torch.randn(3, 8)
    program = canonical(model, x)
    for node in program.calls():
        assert isinstance(node.target, OpOverload)
        positional = [a for a in node.target._schema.arguments if not a.kwarg_only]
        assert len(node.args) == len(positional), node.format_node()
        defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.kwarg_only}
        assert all(defaults[name] != value for name, value in node.kwargs.items()), node.format_node()
    alphas = [n.kwargs.get("alpha", 1) for n in program.calls() if opname(n) == "add"]
    assert alphas == [1, 1, 2]
    assert_same(model, program, x)


def test_twice_is_once() -> None:
    program = canonical(Spellings(), torch.randn(3, 8))
    before = [n.format_node() for n in program.graph.nodes]
    canonicalize(program)
    assert [n.format_node() for n in program.graph.nodes] == before


class Casts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.float64).to(torch.float32) * 2


def test_assertions_about_sizes_and_dtypes_go() -> None:
    model, x = Casts(), torch.randn(3, 8)
    assert any("assert" in name for name in names(capture(model, (x,))))
    program = canonical(model, x)
    assert not any("assert" in name for name in names(program))
    assert_same(model, program, x)


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = x.sum().item()
        torch._check(count < 5)
        return torch.zeros(4) + count


def test_assertions_about_data_stay() -> None:
    program = canonical(Checked(), torch.ones(3, dtype=torch.int64))
    assert "_assert_scalar" in names(program)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            table = torch.cos(x * self.scale + torch.tensor(0.5))
            index = torch.arange(x.shape[0]) + 1
        return self.linear(x) * table + index[:, None]


def test_no_grad_regions_are_inlined_and_detached() -> None:
    model, x = Rotary(), torch.randn(3, 8)
    assert "wrap_with_set_grad_enabled" in names(capture(model, (x,)))
    program = canonical(model, x)
    assert "wrap_with_set_grad_enabled" not in names(program)
    detached = [n for n in program.calls() if n.target is torch.ops.aten.detach.default]
    assert len(detached) == 1  # the integer output needs none
    assert not [name for name, child in program.graph_module.named_children() if isinstance(child, fx.GraphModule)]
    assert_same(model, program, x)


def test_inlined_nodes_know_where_they_come_from() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Rotary()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    program = canonical(Outer(), torch.randn(3, 8))
    cosine = next(n for n in program.calls() if opname(n) == "cos")
    assert cosine.meta[META].owner == "inner"
    assert isinstance(cosine.meta["val"], Tensor)


class Counting(nn.Module):
    """Writes to a buffer under no_grad: with grad on the same write could be an error."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.add_(1)  # pyright: ignore[reportCallIssue]
            y = x * 2
        return self.linear(y)


def test_a_region_that_writes_outside_stays() -> None:
    program = canonical(Counting(), torch.randn(3, 8))
    assert "wrap_with_set_grad_enabled" in names(program)


class Autocast(nn.Module):
    def __init__(self, matmul: bool) -> None:
        super().__init__()
        self.matmul = matmul

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = x @ x.mT if self.matmul else x.cos() * 2
        return y + 1


def test_autocast_regions_that_are_off_are_inlined() -> None:
    x = torch.randn(8, 8)
    for matmul in (False, True):
        program = canonical(Autocast(matmul), x)
        assert "wrap_with_autocast" not in names(program)
        assert_same(Autocast(matmul), program, x)


class Dead(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.cos().sin()
        torch.rand(3)
        y = torch.zeros_like(x)
        y[0] = 1
        return x * 2


def test_dead_nodes_go_but_random_ones_and_writes_stay() -> None:
    program = canonical(Dead(), torch.randn(3, 8))
    assert "cos" not in names(program)
    assert "rand" in names(program)  # it moves the generator on


class Filled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape)
        y[:, :3] = x[:, :3].sin()
        y[:, 3:] = x[:, 3:].cos()
        return y.mT @ y


def test_a_tensor_that_is_filled_in_place_has_a_node_for_the_whole() -> None:
    model, x = Filled(), torch.randn(3, 8)
    program = canonical(model, x)
    whole = next(n for n in program.calls() if opname(n) == "alias")
    written = [n for n in program.calls() if opname(n) == "copy"]
    assert len(written) == 2
    assert {opname(user) for user in whole.users} == {"mT", "matmul"}
    assert_same(model, program, x)
