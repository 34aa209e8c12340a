"""match_attention: find softmax attention in any spelling, in one walk over the graph.

A fused node is attention by definition. A softmax (or what is written like one) is attention if its input is made
elementwise of a product of two computed tensors (queries and keys), and its result weighs a tensor (the values) along
the same axis, unchanged but for zeros. Every other softmax that weighs something is refused with a reason; one that
weighs nothing (a classifier, a router that picks experts) is not mentioned.
"""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.assemble import Assembler, Parts
from gatecc.ir.match.attention.mixed import mixing
from gatecc.ir.match.attention.normalisation import Normalisation, normalisation
from gatecc.ir.match.attention.scores import find_scores
from gatecc.ir.match.attention.values import Blocked, WeightedSum, find_values
from gatecc.ir.match.maps import LinearMaps
from gatecc.ir.match.product import Product
from gatecc.ir.ops import CONTRACTIONS, operands, opname
from gatecc.ir.program import Program, origin
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Attention, Refusal
from gatecc.ir.sizes import node_shape

_OPAQUE = frozenset(
    "flex_attention flex_attention_backward _transformer_encoder_layer_fwd _native_multi_head_attention "
    "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu _flash_attention_forward "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable".split()
)


def match_attention(
    program: Program, flow: Flow | None = None, maps: LinearMaps | None = None
) -> tuple[list[Attention], list[Refusal]]:
    """Every attention of a canonical program, in the order in which they run, and what looks like one but is not."""
    flow = flow or Flow(program)
    assembler = Assembler(flow, maps or LinearMaps(flow))
    found: list[tuple[int, Parts]] = []
    refusals: list[tuple[int, Refusal]] = []
    for node in program.calls():
        outcome = _read(node, flow)
        if isinstance(outcome, Parts):
            found.append((flow.order[node], outcome))
        elif outcome is not None:
            refusals.append((flow.order[node], outcome))
    found.sort(key=lambda pair: pair[0])
    ordinals: Counter[tuple[str, int]] = Counter()
    sites: list[Attention] = []
    for _, parts in found:
        place = parts.owner, origin(parts.core).call
        sites.append(assembler.site(parts, ordinals[place]))
        ordinals[place] += 1
    return sites, [refusal for _, refusal in refusals]


def spelled_out(program: Program, flow: Flow) -> dict[fx.Node, Parts]:
    """The parts of each attention that is no single operator, by its core."""
    read = (_read(node, flow) for node in program.calls() if opname(node) != "scaled_dot_product_attention")
    return {parts.core: parts for parts in read if isinstance(parts, Parts)}


def _read(node: fx.Node, flow: Flow) -> Parts | Refusal | None:
    """What one node is: attention, a refused look-alike, or neither."""
    name = opname(node) or getattr(node.target, "__name__", "")
    if name == "scaled_dot_product_attention":
        return _fused(node)
    if name in _OPAQUE:
        return refuse("GCC105", "attention", node, name)
    found = normalisation(node, flow)
    return _spelled_out(found, flow) if found is not None else None


def _fused(node: fx.Node) -> Parts | Refusal:
    query, key, *_ = operands(node)
    rank = len(node_shape(query) or ())
    batch = "ABCDEF"[: rank - 2]
    product = Product(node, query, key, batch + "nd", batch + "md", batch + "nm")
    return Parts("sdpa", origin(node).owner, node, product, "m")


def _spelled_out(found: Normalisation, flow: Flow) -> Parts | Refusal | None:
    weighted_sum = find_values(found.output, found.axis, flow)
    scores = find_scores(found.input, found.axis, flow)
    if scores is None:
        return _unscored(found, weighted_sum, flow)
    if weighted_sum is None:
        return refuse("GCC103", "attention", found.output)
    if isinstance(weighted_sum, Blocked):
        return refuse(weighted_sum.code, "attention", found.output, f"by {opname(weighted_sum.node)}")
    if weighted_sum.values in flow.raw:
        return refuse("GCC102", "attention", found.output, "the values are a parameter")
    owner = common_owner(origin(found.output).owner, origin(weighted_sum.source.node).owner)
    return Parts(
        found.spelling, owner, weighted_sum.source.node, scores.source, scores.keys, found, scores, weighted_sum
    )


def _unscored(found: Normalisation, weighted_sum: WeightedSum | Blocked | None, flow: Flow) -> Refusal | None:
    """A softmax whose input is no product: of interest if its result is summed over, or either is mixed over heads."""
    mixer = None if weighted_sum is None else mixing(found.input, found.axis, flow)
    if mixer is not None:
        return refuse("GCC107", "attention", found.output, f"by {opname(mixer)}")
    if isinstance(weighted_sum, WeightedSum):
        return refuse("GCC102", "attention", found.output)
    if weighted_sum is not None and weighted_sum.code == "GCC101" and opname(weighted_sum.node) in CONTRACTIONS:
        return refuse("GCC101", "attention", found.output, f"by {opname(weighted_sum.node)}")
    return None


def common_owner(one: str, other: str) -> str:
    """The innermost module that holds both owners."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
