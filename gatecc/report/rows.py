"""The rows of a report. All of them are frozen plain data, so that a report outlives the model it speaks of."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal

import networkx as nx
from torch import fx

from gatecc.ir.graphview import ATTRIBUTES, attributes, uses
from gatecc.ir.program import Program
from gatecc.ir.site import MLP, RNN, Activation, Attention, Merge, Model, Site, Step
from gatecc.ir.sizes import size_names


@dataclass(frozen=True)
class SiteRow:
    """A site that was found. ``mask`` is empty for kinds that have none, ``stages`` are the values that it exposes."""

    kind: str
    owner: str
    key: str
    mask: str = ""
    line: str = ""
    call: int = 0
    stages: tuple[str, ...] = ()
    detail: str = ""

    @staticmethod
    def of(site: Site) -> SiteRow:
        """The row of a site."""
        return SiteRow(
            kind=site.kind,
            owner=site.owner,
            key=site.key,
            mask=str(site.mask) if isinstance(site, Attention) else "",
            line=site.line,
            call=site.call,
            stages=tuple(stage for stage in site.values),
            detail=_detail(site),
        )


@dataclass(frozen=True)
class RungRow:
    """How a module was captured, and why the rung above did not hold (empty for the highest)."""

    fqn: str
    rung: Literal["whole", "submodule", "python"]
    reason: str = ""


@dataclass(frozen=True)
class EffectRow:
    """What a rewrite did to a weight or module at ``path``; ``new`` is the number of elements that it brought."""

    path: str
    text: str
    new: int = 0


@dataclass(frozen=True)
class RewriteRow:
    """One rewrite at one site. ``error`` is the largest difference of the outputs that was measured, None if not."""

    rewrite: str
    recipe: str
    site: str  # the key of the site
    scope: str
    contract: str
    error: float | None = None
    new_parameters: Mapping[str, int] = field(default_factory=dict[str, int])  # FQN -> number of elements
    ms: float = 0.0
    effects: tuple[EffectRow, ...] = ()


@dataclass(frozen=True)
class LoweringRow:
    """What the compile backend says of one place.

    ``became``: the operator that stands there now, empty if it was left alone; ``reason``: why it was left alone, or
    what proved that both are the same; ``gain``: what it saves, an estimate.
    """

    lowering: str
    owner: str
    line: str
    found: str
    became: str = ""
    reason: str = ""
    gain: str = ""


@dataclass(frozen=True)
class BreakRow:
    """Where torch.compile ends a graph and begins another one, and why; between them Python runs."""

    line: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class PassRow:
    """The time of one pass, and the number of nodes that it met and left."""

    name: str
    ms: float
    nodes_before: int = 0
    nodes_after: int = 0


@dataclass(frozen=True)
class NodeRow:
    """One graph node. ``inserted_by`` names the rewrite that made it, empty for the model's own nodes.

    ``shape`` is as in ``b n 48``: letters are sizes that may vary. ``positions`` says for each of ``inputs`` at which
    arguments it stands: ``"0"``, ``"0,1"``, ``"attn_mask"``.
    """

    name: str
    op: str
    target: str
    owner: str = ""
    inputs: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    shape: str = ""
    dtype: str = ""
    inserted_by: str = ""
    line: str = ""


@dataclass(frozen=True)
class GraphDump:
    """A graph as text, in execution order."""

    nodes: tuple[NodeRow, ...] = ()

    @staticmethod
    def of(program: Program) -> GraphDump:
        """The dump of a program as it is now; later rewrites of the program do not change it."""
        sizes = size_names(program.graph)
        return GraphDump(tuple(_node(node, sizes) for node in program.graph.nodes))

    def to_networkx(self) -> nx.DiGraph[str]:
        """The graph as a DiGraph, with the attributes of ``gatecc.ir.graphview``."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        for row in self.nodes:
            graph.add_node(row.name, **{key: getattr(row, key) for key in ATTRIBUTES})
            for source, position in zip(row.inputs, row.positions, strict=True):
                graph.add_edge(source, row.name, position=position)
        return graph


@dataclass(frozen=True)
class GraphPair:
    """A captured graph before and after the rewrites; ``scopes`` are the modules whose graphs have this structure."""

    scopes: tuple[str, ...]
    before: GraphDump
    after: GraphDump | None = None


@dataclass(frozen=True)
class Totals:
    """Sizes of the whole model before and after, and the verdict of the numerical check. None: not measured."""

    parameters_before: int | None = None
    parameters_after: int | None = None
    flops_before: int | None = None
    flops_after: int | None = None  # where what runs depends on data (experts, skipped blocks), those of a run
    bytes_before: int | None = None
    bytes_after: int | None = None
    max_error: float | None = None
    contract: str = ""
    contract_held: bool | None = None
    active_before: int | None = None  # parameters that a token meets, where experts are chosen
    active_after: int | None = None


def environment() -> dict[str, str]:
    """Versions that a figure depends on. No host names and no paths: reports are passed around."""
    rows = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in ("gatecc", "torch", "transformers", "onnx", "onnxruntime"):
        rows |= _version(package)
    return rows


def _version(package: str) -> dict[str, str]:
    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


def _detail(site: Site) -> str:
    """What is worth saying about a site in one line."""
    if isinstance(site, Attention):
        return ", ".join(_attention(site))
    if isinstance(site, MLP):
        return f"{site.form} {site.activation}".strip() + _experts(site)
    if isinstance(site, Activation):
        return site.function
    if isinstance(site, RNN):
        return f"{site.cell}, {site.layers} layer{'s' * (site.layers > 1)}" + ", both directions" * site.bidirectional
    if isinstance(site, Model | Step):
        return ", ".join(site.values)
    return site.form if isinstance(site, Merge) else ""


def _experts(site: MLP) -> str:
    """How many experts there are and are taken, for example ", 2 of 8"."""
    if not site.experts:
        return ""
    return f", {site.chosen} of {site.experts}" if site.chosen else f", {site.experts} of them"


def _attention(site: Attention) -> list[str]:
    words = [site.spelling]
    if site.heads:
        grouped = site.kv_heads not in (0, site.heads)
        words.append(f"{site.heads} heads" + (f" on {site.kv_heads}" if grouped else ""))
    words += ["rotary"] * site.rotary + ["cross"] * site.cross + ["between channels"] * (site.over == "channels")
    return words + [f"dropout {site.dropout:g}"] * bool(site.dropout)


def _node(node: fx.Node, sizes: Mapping[str, str]) -> NodeRow:
    places = uses(node)
    return NodeRow(name=node.name, inputs=tuple(places), positions=tuple(places.values()), **attributes(node, sizes))
