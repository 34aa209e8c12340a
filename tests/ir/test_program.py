"""What a node reads: attributes and lifted placeholders answer alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

from gatecc.capture import capture
from gatecc.ir.match import find_sites
from gatecc.ir.program import Program, copy_for
from gatecc.ir.site import Site
from gatecc.pipeline import canonical_form

TABLE = torch.arange(8.0)


class Model(nn.Module):
    """Every way to hold a tensor: tied, spelled out, stacked, a buffer, a constant; one input looks like a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.stack = nn.Parameter(torch.randn(3, 8, 8))
        self.register_buffer("scale", torch.full((8,), 0.5))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, weight: Tensor) -> Tensor:
        x = self.rnn(self.layer(self.table(tokens)))[0] * self.scale + TABLE
        return self.head(x @ weight) + self.head.weight.sum() * (x[:, None] @ self.stack).sum()


@pytest.fixture(scope="module")
def both() -> tuple[Program, Program]:
    """A program with attributes, and the same one with these as placeholders before its inputs."""
    torch.manual_seed(0)
    program = capture(Model().eval(), (torch.randint(11, (2, 5)), torch.randn(8, 8)), fqn="outer.model")
    canonical_form(program)
    other = copy_for(program, program.module, program.fqn, program.example)
    first = other.placeholders[0]
    for node in other.graph.find_nodes(op="get_attr"):
        if other.weight(node) is not None:
            with other.graph.inserting_before(first):
                lifted = other.graph.placeholder(f"lifted_{node.name}")
            lifted.meta = dict(node.meta)
            other.lifted[lifted] = str(node.target)
            node.replace_all_uses_with(lifted)
            other.graph.erase_node(node)
    return program, other


def _held(program: Program) -> Iterator[tuple[fx.Node, str]]:
    return ((n, name) for n in program.graph.nodes if (name := program.weight_name(n)) is not None)


def test_weights_are_the_live_tensors_by_their_name_in_the_model(both: tuple[Program, Program]) -> None:
    model = both[0].module
    assert isinstance(model, Model)
    live = {f"outer.model.{name}": x for name, x in [*model.named_parameters(), *model.named_buffers()]}
    live["outer.model.head.weight"] = live.pop("outer.model.table.weight")  # tied: one node, by one of its names
    for program in both:
        found = {name: program.weight(node) for node, name in _held(program)}
        assert found.keys() == live.keys()
        assert all(found[name] is live[name] for name in live)
        assert {name for node, name in _held(program) if not program.is_parameter(node)} == {"outer.model.scale"}


def test_inputs_and_constants_are_no_weights(both: tuple[Program, Program]) -> None:
    for program in both:
        assert [n.name for n in program.placeholders] == ["tokens", "weight"]
        assert [program.tensor(n) for n in program.placeholders] == [None, None]
        constants = [n for n in program.graph.nodes if program.constant(n) is not None]
        assert len(constants) == 1
        assert program.weight(constants[0]) is None
        assert program.weight_name(constants[0]) is None
        held = program.tensor(constants[0])
        assert held is not None
        assert torch.equal(held, TABLE)
        assert all(program.path(n) is None for n in program.calls())


def test_readers_of_a_weight(both: tuple[Program, Program]) -> None:
    for program in both:
        read = program.readers("outer.model.head.weight")
        assert sorted(str(n.target).split(".")[1] for n in read) == ["embedding", "linear", "sum"]
        assert not program.readers("outer.other.head.weight")


def test_sites_are_found_alike(both: tuple[Program, Program]) -> None:
    rows = [[_row(site) for site in find_sites(program).sites] for program in both]
    assert {site.kind for site in find_sites(both[0]).sites} > {"attention", "mlp", "rnn", "embedding"}
    assert rows[1] == rows[0]
    refusals = [find_sites(program).refusals for program in both]
    assert refusals[0] == refusals[1] != []


def _row(site: Site) -> tuple[str, ...]:
    values = {stage: (value.node.name, value.axes) for stage, value in site.values.items()}
    rest = {k: v for k, v in vars(site).items() if not isinstance(v, fx.Node) and k not in ("values", "states", "last")}
    return site.kind, site.key, repr(values), repr(rest)
