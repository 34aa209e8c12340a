"""Attention maps: the softmax weights that a model hands on beside its output, once something else takes their place.

They would be those of an attention that nothing uses. Libraries hand None on where attention has no weights to show.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from gatecc.ir.boundary import Boundary, Slot
from gatecc.ir.edit import Editor
from gatecc.ir.program import fake, origin
from gatecc.ir.site import Attention, Site


def forget(site: Site, edit: Editor) -> None:
    """Let the outputs that show the weights of a site be None, for hooks too; its heads are something else by now.

    What the model computes of the weights itself, it goes on to compute.
    """
    maps = _maps(site)
    program = edit.program
    output = program.graph.output_node()
    shown = [n for n in program.outputs if n in maps]
    edit.hidden |= {i for i, n in enumerate(program.outputs) if n in maps}
    output.args = (tuple([None if n in maps else n for n in program.outputs]),)
    for boundary in program.boundaries:
        if boundary.leaving and boundary.slots > 1:
            _hide(boundary, maps)
    for node in shown:
        edit.discard(node)


def readers(site: Site) -> set[str]:
    """The owners of the nodes that read the weights of a site, but for the site's own product with the values."""
    users = {user for node in _maps(site) for user in node.users if user.op == "call_function"}
    return {origin(user).owner for user in users - _later(site)}


def _maps(site: Site) -> set[fx.Node]:
    """The weights, and what is computed of them and is still a number for each query and key: dropped out, averaged."""
    weights = site.find("weights")
    if weights is None:
        return set()
    found = {weights.node}
    wanted = _last_axes(weights.node)
    for node in weights.node.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes) and node not in _later(site) and _last_axes(node) == wanted:
            found.add(node)
    return found


def _later(site: Site) -> set[fx.Node]:
    """What comes of weights and values together."""
    core = {site.core} if isinstance(site, Attention) else set[fx.Node]()
    return core | {site.values[name].node for name in ("heads", "out") if name in site.values}


def _last_axes(node: fx.Node) -> Any:
    held = fake(node)
    return None if held is None or held.dim() < 2 else tuple(map(str, held.shape[-2:]))


def _hide(boundary: Boundary, maps: set[fx.Node]) -> None:
    kept = [i for i, value in enumerate(boundary.values) if value not in maps]
    if not kept:
        return
    number = {old: Slot(new) for new, old in enumerate(kept)}
    leaves = [number.get(leaf.number) if isinstance(leaf, Slot) else leaf for leaf in boundary.leaves]
    boundary.leaves = tuple(leaves)
    boundary.values = [boundary.values[i] for i in kept]
    boundary.readers = [boundary.readers[i] for i in kept]
