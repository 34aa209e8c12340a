"""One registration is all that decoder, ONNX, cost and compiler need: an operator with a state, defined here alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import gatecc
from gatecc.capture import capture
from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ArgumentError, DecoderError, ExportError
from gatecc.ir.ops import named
from gatecc.ops import registry
from gatecc.ops.registry import Carry, Operator, StepRule, Unfit
from gatecc.pipeline.cost import Cost, node_cost
from tests.decoder.mixing import D, Mixed, V
from tests.decoder.stepping import difference, full, stepped

IDS, LONG = torch.randint(V, (2, 9)), torch.randint(V, (3, 16))


@torch.library.custom_op("gatecc_toy::average", mutates_args=())
def average(x: Tensor, decay: Tensor, start: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """A moving average along the tokens, y_t = decay y_(t-1) + x_t. x: (B, N, C), decay: (C,) -> y and its last value.

    start: (B, C), the value before the first token.
    """
    y, out = x.new_zeros(x.size(0), x.size(2)) if start is None else start, list[Tensor]()
    for token in reversed(x.unbind(1)) if reverse else x.unbind(1):
        y = decay * y + token
        out.append(y)
    return torch.stack(out[::-1] if reverse else out, 1), y.clone()


@average.register_fake
def _(x: Tensor, decay: Tensor, start: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.size(0), x.size(2))


def in_onnx(x: Tensor, decay: Tensor, start: Tensor | None = None, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The same as a product with powers of the decay, (C, N, N)."""
    at = torch.arange(x.size(1))
    distance = at[:, None] - at
    weights = torch.where(distance >= 0, decay[:, None, None] ** distance.clamp_min(0), 0.0)
    y = torch.einsum("cts,bsc->btc", weights, x)
    return y, y[:, -1]


def refuse_reverse(node: fx.Node) -> None:
    """The form runs forwards, from no start."""
    if named(node, "reverse"):
        raise ExportError("a moving average in ONNX runs forwards", where=place(node))


def unfit(node: fx.Node) -> Unfit | None:
    """A decoder runs forwards."""
    return Unfit("a moving average from the end", "average from the start") if named(node, "reverse") else None


def one_token(x: Tensor, decay: Tensor, start: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """What a step of a single token runs."""
    COUNT.append(1)
    y = decay * start + x[:, 0]
    return y.unsqueeze(1), y


COUNT: list[int] = []
ENTRY = Operator(
    overload=torch.ops.gatecc_toy.average.default,
    step=StepRule(
        operand="x", axis=1, carries=(Carry("start", output=1),), unfit=unfit, one_token=lambda node: one_token
    ),
    onnx={"portable": Lowering(in_onnx, refuse_reverse)},
    flops=lambda x, decay, *rest, **options: 2 * x[0] * x[1] * x[2],
    bytes=lambda x, decay, *rest, **options: 2 * x.numel() * x.element_size(),
)
registry.register(ENTRY)


class Average(nn.Module):
    """A learned moving average."""

    def __init__(self, *, reverse: bool = False) -> None:
        super().__init__()
        self.logit, self.reverse = nn.Parameter(torch.randn(D)), reverse

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return average(x, self.logit.sigmoid(), None, self.reverse)[0]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Mixed(Average()).eval()


def test_it_is_decoded_step_by_step(model: nn.Module) -> None:
    made = gatecc.decoder(model, (IDS,))
    (slot,) = made.plan.slots
    assert slot.kind == "state"
    COUNT.clear()
    assert difference(full(model, LONG), stepped(made, LONG)) <= 1e-6
    assert len(COUNT) == 6  # the single tokens of the pieces
    with pytest.raises(DecoderError, match="from the end"):
        gatecc.decoder(Mixed(Average(reverse=True)).eval(), (IDS,))


def test_it_is_exported(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    made = gatecc.export(model, tmp_path / "average", (IDS,))
    assert {"batch", "sequence"} <= set(made.dims)
    assert max(c.error for c in made.compared) <= 1e-5
    with pytest.raises(ExportError, match="runs forwards"):
        gatecc.export(Mixed(Average(reverse=True)).eval(), tmp_path / "reverse", (IDS,))


def test_it_is_costed(model: nn.Module) -> None:
    program = capture(model, (IDS,), {})
    (node,) = [n for n in program.calls() if n.target is ENTRY.overload]
    assert node_cost(node, program.graph_module) == Cost(2 * 2 * 9 * D, 2 * 2 * 9 * D * 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        average(torch.zeros(2, 9, D), torch.zeros(D))
    assert counter.get_total_flops() == 2 * 2 * 9 * D


def test_it_is_compiled_with_a_free_length(model: nn.Module) -> None:
    compiled = torch.compile(model, backend="gatecc", mode="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for ids in (IDS, LONG):
            torch.testing.assert_close(compiled(ids), model(ids))


def test_an_operator_is_registered_once() -> None:
    with pytest.raises(ArgumentError, match="registered twice"):
        registry.register(ENTRY)
    assert registry.find(ENTRY.overload) is ENTRY
    assert registry.find(torch.ops.aten.add.Tensor) is None


def test_a_form_for_all_targets_gives_way_to_one_for_its_own() -> None:
    targets: tuple[registry.Target, ...] = ("portable", "ort", "opset27")
    with_one, with_several = (
        [registry.lowerings(target)[overload] for target in targets]
        for overload in (ENTRY.overload, torch.ops.gatecc.linear_attention.default)
    )
    assert with_one == [ENTRY.onnx["portable"]] * 3
    assert len({id(lowering) for lowering in with_several}) == 3
