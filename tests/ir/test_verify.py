"""Graph faults injected on purpose: each is caught, naming the rewrite, the site and its line; the model is
unchanged."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import gatecc
from gatecc import MLP, Contract, Rewrite
from gatecc.errors import ContractError, GateccError, GraphError
from gatecc.ir.contract import exact, identity_at_init, within
from gatecc.ir.edit import Editor
from gatecc.ir.program import META, Origin
from gatecc.ir.site import Site


class Net(nn.Module):
    """One feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Net()
        self.second = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


Fault = Callable[[Site, Editor], None]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    """Register a way to break a graph."""
    FAULTS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Broken(Rewrite):
    """A rewrite that does the named harm and promises ``promise``."""

    name = "broken"

    harm: str = ""
    promise: Contract = exact()

    def contract(self) -> Contract:
        return self.promise

    def rewrite(self, site: Site, edit: Editor) -> None:
        FAULTS[self.harm](site, edit)


@fault
def use_before_definition(site: Site, edit: Editor) -> None:
    out = site.values["out"].node
    early = edit.program.placeholders[-1].next
    with edit.program.graph.inserting_before(early):
        node = edit.program.graph.call_function(torch.ops.aten.neg.default, (out,))
    node.meta = {**out.meta, META: Origin(site.owner, 0, site.line, "broken")}
    edit.inserted.add(node)
    edit.program.graph.output_node().args = ((node,),)


@fault
def wrong_shape(site: Site, edit: Editor) -> None:
    out = site.values["out"].node
    edit.replace(out, edit.call(_half, out))


def _half(x: Tensor) -> Tensor:
    return x[..., :4]


@fault
def wrong_dtype(site: Site, edit: Editor) -> None:
    out = site.values["out"].node
    edit.replace(out, edit.call(Tensor.double, out))


@fault
def lost_parameter(site: Site, edit: Editor) -> None:
    out = site.values["out"].node
    edit.replace(out, edit.call(torch.zeros_like, site.values["in"].node))


@fault
def missing_parameter(site: Site, edit: Editor) -> None:
    weight = next(n for n in edit.program.graph.nodes if n.op == "get_attr")
    weight.target = "up.wieght"


@fault
def changed_output(site: Site, edit: Editor) -> None:
    output = edit.program.graph.output_node()
    output.args = ((*edit.program.outputs, edit.program.placeholders[0]),)


@fault
def self_reference(site: Site, edit: Editor) -> None:
    """Gate an early value by a later one that depends on it."""
    early, late = site.values["in"].node, site.values["out"].node
    edit.replace(early, edit.call(torch.mul, early, late))


@fault
def broken_contract(site: Site, edit: Editor) -> None:
    out = site.values["out"].node
    edit.replace(out, edit.call(torch.mul, out, 1.01))


@fault
def raises(site: Site, edit: Editor) -> None:
    raise KeyError("nothing here")


@fault
def rewired_operand(site: Site, edit: Editor) -> None:
    """Swap an operand of an existing node for one of another shape, without the editor."""
    out: fx.Node = site.values["out"].node
    out.args = (site.values["in"].node, *out.args[1:])


@pytest.mark.parametrize("harm", sorted(FAULTS))
@pytest.mark.parametrize("inplace", [False, True])
def test_each_fault_is_caught_and_named(harm: str, inplace: bool) -> None:
    model = Model().eval()
    x = torch.randn(2, 3, 8)
    before = model(x)
    names = set(model.state_dict())
    with pytest.raises((GraphError, ContractError)) as caught:
        gatecc.transform(model, [Broken(MLP["second"].out, harm)], (x,), inplace=inplace)
    message = str(caught.value)
    assert "broken" in message, "the rewrite"
    assert "second" in message, "the site"
    assert re.search(r"test_verify\.py:\d+", message), "the line"
    assert "%" in message, "the graph around it"
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == names
    assert type(model.second) is Net


def test_the_guilty_one_of_many_is_found() -> None:
    model, x = Model().eval(), torch.randn(2, 3, 8)
    fine = Broken(MLP[...].out, "identity")
    FAULTS["identity"] = lambda site, edit: edit.replace(
        site.values["out"].node, edit.call(torch.mul, site.values["out"].node, 1.0)
    )
    wrong = Broken(MLP["second"].out, "broken_contract", within(1e-4))
    with pytest.raises(ContractError) as caught:
        gatecc.transform(model, [fine, wrong, fine], (x,))
    del FAULTS["identity"]
    assert "within(0.0001)" in str(caught.value)
    assert "second" in caught.value.where


@pytest.mark.parametrize("promise", [exact(), within(1e-3), identity_at_init()])
def test_every_checked_contract_is_checked(promise: Contract) -> None:
    with pytest.raises(ContractError):
        gatecc.transform(Model().eval(), [Broken(MLP[...].out, "broken_contract", promise)], (torch.randn(2, 3, 8),))


def test_a_declared_change_passes() -> None:
    from gatecc.ir.contract import changes_function

    model, x = Model().eval(), torch.randn(2, 3, 8)
    changed = gatecc.transform(model, [Broken(MLP[...].out, "broken_contract", changes_function())], (x,))
    assert not torch.equal(changed(x), model(x))


@dataclass(frozen=True)
class Replacing(Rewrite):
    """Puts zeros in the place of a value, whose weights go: as many of them as it declares."""

    name = "replacing"

    declared: int = 0

    def contract(self) -> Contract:
        from gatecc.ir.contract import changes_function

        return changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None:
        FAULTS["lost_parameter"](site, edit)
        edit.lost |= set(["up.weight", "up.bias", "down.weight", "down.bias"][: self.declared])


def test_parameters_may_go_if_each_is_declared() -> None:
    model, x = Model().eval(), torch.randn(2, 3, 8)
    changed = gatecc.transform(model, [Replacing(MLP["first"].out, 4)], (x,))
    assert torch.equal(changed(x), model.second(x))
    assert changed.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(GraphError, match=r"down\.bias no longer takes part"):
        gatecc.transform(model, [Replacing(MLP["first"].out, 3)], (x,))


def test_errors_are_gatecc_errors_and_survive_pickling() -> None:
    import pickle

    error: Any = GraphError("what", where="here", found="this", expected="that", do="so")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, GateccError)
    assert str(again) == str(error)
