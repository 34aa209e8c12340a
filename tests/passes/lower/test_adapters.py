"""adapters: LoRA, however it is written, takes the form that costs least, with the same numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc import backend
from gatecc.backend.options import Options
from gatecc.ir.ops import opname
from gatecc.passes.lower import Outcome
from gatecc.train.lora import Adapters, Lora

D, OUT, R = 256, 320, 4


class Model(nn.Module):
    """A Linear of x: (B, N, 256)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def peft(count: int, dropout: float = 0.0) -> nn.Module:
    """Adapters of peft, all of them active, with B that is not zero."""
    library = pytest.importorskip("peft")
    model: Any = library.get_peft_model(Model(), _config(library, dropout))
    for i in range(1, count):
        model.add_adapter(f"{i}", _config(library, dropout))
    if count > 1:
        model.base_model.set_adapter(["default", *map(str, range(1, count))])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def _config(library: Any, dropout: float) -> Any:
    return library.LoraConfig(r=R, lora_alpha=12, target_modules=["base"], lora_dropout=dropout)


class ByHand(Model):
    """Two adapters, one of them scaled within, that are added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = (nn.Parameter(torch.randn(R, D)) for _ in range(2))
        self.b, self.d = (nn.Parameter(torch.randn(OUT, R)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        y += F.linear(F.linear(x, self.a) * 0.5, self.b)
        y += 0.25 * F.linear(F.linear(x, self.c), self.d)
        return y


class Own(nn.Module):
    """gatecc's own, as a training step hands it to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.adapters = Adapters(self.model, Lora(rank=R, targets=("base.weight",)))
        for b in self.adapters.b:
            nn.init.normal_(b, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.model, self.adapters.weights(self.model), (x,))


def compiled(model: nn.Module, x: Tensor, *, freeze: bool = False) -> tuple[Any, Any, list[str]]:
    """The result, what is said of it, and the operators of the graph."""
    outcomes: list[Outcome] = []
    names: list[str] = []

    def spy(graph_module: Any, example: Any) -> Callable[..., Any]:
        found = backend.lower(graph_module, example, Options(freeze=freeze))
        assert not found.faults
        outcomes.extend(o for o in found.outcomes if o.lowering == "adapters")
        names.extend(map(opname, found.graph.graph.nodes))
        return found.graph.forward

    torch._dynamo.reset()
    y = torch.compile(model, backend=spy)(x)
    assert len(outcomes) <= 1
    return y, outcomes[0] if outcomes else None, names


def input_(rows: int) -> Tensor:
    return torch.randn(2, rows // 2, D, generator=torch.Generator().manual_seed(rows))


def assert_the_same(model: nn.Module, x: Tensor, found: Tensor) -> None:
    """Result and all gradients, of x too."""
    learning = [p for p in (*model.parameters(), x) if p.requires_grad]
    expected = model(x)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    ours, theirs = (torch.autograd.grad(y.square().sum(), learning) for y in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("made", [lambda: peft(3), lambda: peft(3, dropout=0.5), ByHand, Own])
def test_training(made: Callable[[], nn.Module]) -> None:
    """Two products beside the Linear: a sum in its weight would want the gradient of all of the weight."""
    torch.manual_seed(0)
    model, x = made(), input_(512).requires_grad_()
    model.requires_grad_(True).get_parameter(_weight(model)).requires_grad_(False)
    torch.manual_seed(1)
    y, outcome, names = compiled(model, x)
    assert outcome.became == "two products beside it", outcome
    assert names.count("linear") == (5 if "dropout" in names else 3)
    if "dropout" not in names:
        assert_the_same(model, x, y)
        return
    torch.manual_seed(1)
    assert torch.allclose(y, model(x), atol=1e-4)


def _weight(model: nn.Module) -> str:
    return next(n for n, p in model.named_parameters() if p.shape == (OUT, D))


@pytest.mark.parametrize("made", [lambda: peft(1), lambda: peft(2), ByHand])
def test_many_rows_are_cheaper_with_the_sum_in_the_weight(made: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = made(), input_(2048)
    with torch.no_grad():
        y, outcome, names = compiled(model, x)
        expected = model(x)
    assert outcome.became == "the sum in its weight"
    assert names.count("linear") == 1
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_few_rows_are_cheaper_beside_it() -> None:
    torch.manual_seed(0)
    model, x = Own(), input_(2)
    with torch.no_grad():
        y, outcome, names = compiled(model, x)
        assert torch.allclose(y, model(x), atol=1e-4)
    assert outcome.became == "two products beside it"
    assert names.count("linear") == 3


def test_weights_that_stay_are_added_once_and_never_stale() -> None:
    torch.manual_seed(0)
    model, x = peft(2), input_(6)
    with torch.no_grad():
        assert compiled(model, x, freeze=True)[1].became == "the sum in its weight, computed once"
        options: dict[str, Any] = {"gatecc.freeze": True, "compile_threads": 1}
        frozen: Any = torch.compile(model, backend="gatecc", options=options)
        for _ in range(2):
            assert torch.allclose(frozen(x), model(x), atol=1e-4)
            next(p for n, p in model.named_parameters() if "lora_A" in n).mul_(2)


class Nonlinear(ByHand):
    """A function between the factors, and a value that is written before the second product."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a).relu(), self.b)


class Written(ByHand):
    """The second product reads another value."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y = self.base(x)
        x.mul_(2)
        return y + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.parametrize("model", [Nonlinear(), Written(), Model()])
def test_what_is_no_adapter(model: nn.Module) -> None:
    with torch.no_grad():
        assert compiled(model, input_(2048))[1] is None


def test_one_adapter_with_few_rows_and_half_precision_stay() -> None:
    model, x = peft(1), input_(2)
    with torch.no_grad():
        assert compiled(model, x)[1].reason.startswith("no other form costs less with 2 rows")
        outcome = compiled(model.bfloat16(), input_(2048).bfloat16(), freeze=True)[1]
    assert not outcome.became
    assert "loses digits" in outcome.reason
