"""Block sites: the repeated unit of a model, a child of a ModuleList or Sequential with siblings of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx, nn

from gatecc.ir.match.facts import Facts, Place
from gatecc.ir.match.region import Region, regions
from gatecc.ir.match.registry import matcher
from gatecc.ir.match.shapes import same_shape
from gatecc.ir.program import origin
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Block, Refusal

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@matcher
def match_block(facts: Facts) -> Iterator[Block | Refusal]:
    """One site a call of a repeated unit that maps a value to one of its shape, in execution order (or GCC170-171).

    A convolution with its norm and activation is one layer, not a unit.
    """
    units = _repeated(facts)
    found = regions(facts, units)
    calls = Counter(region.owner for region in found)
    for region in found:
        layers = sum(node in facts.projections for node in region.nodes)
        if layers > 1 and (units[region.owner] > 1 or calls[region.owner] > 1):
            yield _block(facts, region)


def _repeated(facts: Facts) -> dict[str, int]:
    """The FQNs of container children that hold modules, with the number of siblings of their class."""
    units: dict[str, int] = {}
    for path, module in facts.program.module.named_modules():
        if not isinstance(module, _CONTAINERS):
            continue
        children = [
            (name, child) for name, child in module.named_children() if next(child.children(), None) is not None
        ]
        classes = Counter(type(child) for _, child in children)
        for name, child in children:
            units[facts.program.full_name(f"{path}.{name}" if path else name)] = classes[type(child)]
    return units


def _block(facts: Facts, region: Region) -> Block | Refusal:
    outs, ins = region.leaves(facts), region.enters(facts)
    first = region.nodes[0]
    if not outs or not ins:
        return refuse("GCC171", "block", first, "nothing enters or nothing leaves", owner=region.owner)
    pairs = [(given, out) for out in outs for given in ins if same_shape(given, out)]
    if not pairs:
        return refuse("GCC170", "block", first, owner=region.owner)
    if len({out for _, out in pairs}) > 1:
        names = ", ".join(out.name for out in dict.fromkeys(out for _, out in pairs))
        return refuse("GCC171", "block", first, f"it yields {names}", owner=region.owner)
    # Of several inputs of this shape (encoder states in a decoder block) the stream is the one computed last.
    given, out = max(pairs, key=lambda pair: facts.order[pair[0]])
    place = Place(owner=region.owner, ordinal=0, call=region.call, line=_line(region, out))
    return Block(**place, values={"in": facts.value(given), "out": facts.value(out)})


def _line(region: Region, out: fx.Node) -> str:
    own = [node for node in region.nodes if origin(node).owner == region.owner]
    return origin(own[-1] if own else out).line
