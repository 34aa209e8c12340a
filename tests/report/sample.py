"""Reports for the tests: one that fills every field, and a strategy for any other."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from gatecc.ir.site import Refusal
from gatecc.report import (
    BreakRow,
    EffectRow,
    GraphDump,
    GraphPair,
    LoweringRow,
    NodeRow,
    PassRow,
    Report,
    RewriteRow,
    RungRow,
    SiteRow,
    Totals,
)


def node(
    name: str, *inputs: str, op: str = "call_function", target: str = "", owner: str = "", by: str = ""
) -> NodeRow:
    """A graph node of shape (2, 8)."""
    target = target or f"aten.{name}.default"
    positions = tuple(str(i) for i in range(len(inputs)))
    return NodeRow(name, op, target, owner, inputs, positions, "2x8", "float32", by, "model.py:7")


def gated_layer(layers: int = 1) -> GraphPair:
    """x -> linear -> relu -> add(x), repeated; afterwards a gate multiplies the relu."""
    before = [node("x", op="placeholder", target="x")]
    after = list(before)
    last = "x"
    for i in range(layers):
        here = f"layers.{i}"
        weight = node(f"w_{i}", op="get_attr", target=f"{here}.fc.weight", owner=f"{here}.fc")
        linear = node(f"linear_{i}", last, weight.name, owner=f"{here}.fc")
        relu = node(f"relu_{i}", linear.name, owner=f"{here}.act")
        add = node(f"add_{i}", last, relu.name, owner=here)
        before += [weight, linear, relu, add]
        gate = node(f"gate_{i}", op="get_attr", target=f"{here}.gate.weight", owner=here, by="gate")
        mul = node(f"mul_{i}", relu.name, gate.name, owner=here, by="gate")
        after += [weight, linear, relu, gate, mul, node(f"add_{i}", last, mul.name, owner=here)]
        last = add.name
    end = node("output", last, op="output", target="output")
    return GraphPair(("",), GraphDump((*before, end)), GraphDump((*after, end)))


def full_report(layers: int = 3) -> Report:
    """A report with something in every field."""
    report = Report(model="TinyEncoder", recipe="gated-attention", environment={"torch": "2.14.1"})
    for i in range(layers):
        owner = f"layers.{i}.attn"
        report.sites.append(
            SiteRow("attention", owner, f"{owner}#0", "causal+padding", "model.py:12", 0, ("q", "k"), "sdpa, 4 heads")
        )
        effects = (EffectRow(f"{owner}.gate", f"new {owner}.gate", 64), EffectRow(f"{owner}.q", f"drop {owner}.q"))
        contract = "identity_at_init(1e-06)"
        report.rewrites.append(
            RewriteRow("gate", "gated-attention", f"{owner}#0", owner, contract, 2e-7, {"g": 64}, 1.5, effects)
        )
    report.refusals.append(
        Refusal("GCC104", "attention", "router", "model.py:40", "a softmax over experts", "select MLP sites instead")
    )
    report.rungs += [RungRow("layers.0", "submodule", "data-dependent branch"), RungRow("layers.1", "submodule")]
    report.passes += [PassRow("canonicalize", 12.5, 40, 31), PassRow("gate", 3.25, 31, 37)]
    report.graphs.append(gated_layer(layers))
    report.totals = Totals(1000, 1192, 5_000_000, 5_100_000, 40_000, 41_000, 2e-7, "identity_at_init(1e-06)", True)
    report.notes.append("use_cache was switched off")
    return report


def compiled_report(layers: int = 3) -> Report:
    """A report of `explain` with something in every field that it has."""
    report = Report(model="TinyDecoder", compiled="training", environment={"torch": "2.14.1"})
    for i in range(layers):
        row = LoweringRow(
            "causal-mask", f"layers.{i}.attn", "model.py:12", "a causal <mask>", "is_causal=True", "proved"
        )
        report.lowered.append(replace(row, gain="half of the scores"))
    report.lowered.append(LoweringRow("causal-mask", "cross", "model.py:30", "a mask", "", "it is an input"))
    report.breaks.append(BreakRow("model.py:41", "a branch depends on the value of a tensor", "torch.where"))
    report.graphs += [gated_layer(layers), GraphPair(("graph 2",), gated_layer(1).before)]
    report.passes.append(PassRow("lower causal-mask", 1.5, 40, 31))
    return report


TEXT = st.text(max_size=24)
COUNT = st.none() | st.integers(0, 10**15)
ERROR = st.none() | st.floats()


def reports() -> st.SearchStrategy[Report]:
    """Reports with any text in any place."""
    nodes = st.builds(
        NodeRow,
        name=TEXT,
        op=st.sampled_from(["placeholder", "get_attr", "call_function", "output"]),
        target=TEXT,
        owner=TEXT,
        inputs=st.lists(TEXT, max_size=2).map(tuple),
        shape=TEXT,
        dtype=TEXT,
        inserted_by=TEXT,
        line=TEXT,
    )
    dumps = st.builds(GraphDump, st.lists(nodes, max_size=4).map(tuple))
    return st.builds(
        Report,
        model=TEXT,
        recipe=TEXT,
        sites=st.lists(
            st.builds(SiteRow, TEXT, TEXT, TEXT, TEXT, TEXT, st.integers(0, 9), st.lists(TEXT).map(tuple), TEXT),
            max_size=3,
        ),
        refusals=st.lists(st.builds(Refusal, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT), max_size=3),
        rungs=st.lists(st.builds(RungRow, TEXT, st.sampled_from(["whole", "submodule", "python"]), TEXT), max_size=2),
        rewrites=st.lists(
            st.builds(
                RewriteRow,
                TEXT,
                TEXT,
                TEXT,
                TEXT,
                TEXT,
                ERROR,
                st.dictionaries(TEXT, st.integers(0, 10**9), max_size=2),
                st.floats(0, 1e6),
                st.lists(st.builds(EffectRow, TEXT, TEXT, st.integers(0, 10**9)), max_size=2).map(tuple),
            ),
            max_size=3,
        ),
        compiled=TEXT,
        lowered=st.lists(st.builds(LoweringRow, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT, TEXT), max_size=3),
        breaks=st.lists(st.builds(BreakRow, TEXT, TEXT, TEXT), max_size=2),
        passes=st.lists(
            st.builds(PassRow, TEXT, st.floats(0, 1e6), st.integers(0, 99), st.integers(0, 99)), max_size=3
        ),
        graphs=st.lists(st.builds(GraphPair, st.lists(TEXT).map(tuple), dumps, st.none() | dumps), max_size=2),
        totals=st.builds(Totals, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT, ERROR, TEXT, st.none() | st.booleans()),
        notes=st.lists(TEXT, max_size=2),
        environment=st.dictionaries(TEXT, TEXT, max_size=2),
    )
