"""Experts: MLPs whose weights are stacked along an expert axis (Mixtral, Qwen-MoE, GPT-OSS in transformers).

However the tokens are dispatched (grouped products, gathered weights, a loop, one operator), the owner of the stacked
parameters is the site: what enters it with the shape of what leaves it is the stream. Who chose the experts is found
by gatecc.ir.match.routing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.projection import CONV_OPS, swaps
from gatecc.ir.match.region import Region, regions
from gatecc.ir.match.registry import matcher
from gatecc.ir.match.routing import routing
from gatecc.ir.match.shapes import same_shape
from gatecc.ir.ops import CASTS, SAME_SHAPE, TRANSPOSES, VIEWS, argument, opname
from gatecc.ir.program import shape
from gatecc.ir.refusals import refuse
from gatecc.ir.site import MLP, Refusal, Weight

_PRODUCTS = frozenset("bmm baddbmm matmul mm addmm linear einsum _grouped_mm grouped_mm_fallback".split())
_ON_THE_WAY = VIEWS | CASTS | TRANSPOSES | SAME_SHAPE
_OPERATOR = "moe_ffn"  # all of it in one node
_LONGEST = 8  # nodes between a product and its bias


@dataclass(frozen=True, eq=False)
class _Product:
    """A product of rows with one matrix of a stack. ``contracted``: the axis of the stack that it sums over, 1 or 2;
    0 if that is not known."""

    node: fx.Node
    stack: fx.Node
    operand: fx.Node  # what shows the stack
    contracted: int = 0
    bias: str | None = None


@matcher
def match_experts(facts: Facts) -> Iterator[MLP | Refusal]:
    """One site a call of a module that holds stacked weights and activates between them (else GCC144)."""
    stacks = _stacks(facts)
    for region in regions(facts, stacks):
        found = _experts(facts, region, stacks[region.owner])
        if found is not None:
            yield found


def _stacks(facts: Facts) -> dict[str, list[fx.Node]]:
    """The stacked parameters that products read, by the module that holds at least two of them, in order of use."""
    by_owner: dict[str, list[fx.Node]] = {}
    for node in facts.program.graph.nodes:
        if not isinstance(parameter := facts.program.weight(node), torch.nn.Parameter):
            continue
        if parameter.dim() == 3 and not any(opname(user) in CONV_OPS for user in node.users):
            by_owner.setdefault(_name(facts, node).rpartition(".")[0], []).append(node)
    lonely = [owner for owner, nodes in by_owner.items() if len(nodes) == 1]
    for owner in lonely:  # one parameter a module: the module above holds them
        by_owner.setdefault(owner.rpartition(".")[0], []).extend(by_owner.pop(owner))
    return {owner: nodes for owner, nodes in by_owner.items() if len(nodes) > 1}


def _experts(facts: Facts, region: Region, stacks: list[fx.Node]) -> MLP | Refusal | None:
    activations = [facts.nonlinearities[node] for node in region.nodes if node in facts.nonlinearities]
    whole = next((node for node in region.nodes if opname(node) == _OPERATOR), None)
    products = _products(facts, region, stacks) if whole is None else _inside(facts, whole, stacks)
    if not (activations or whole) or len({product.stack for product in products}) < 2:
        return None  # stacked weights of another kind, such as one matrix per head
    outs = region.leaves(facts)
    pairs = [(given, out) for out in outs for given in region.enters(facts) if same_shape(given, out)]
    if len(pairs) != 1:
        return refuse("GCC144", "mlp", region.nodes[0], f"{len(outs)} values leave it", owner=region.owner)
    given, out = pairs[0]
    values = {"in": facts.value(given), "out": facts.value(out)}
    if whole is None:
        values["hidden"] = facts.value(_rows(products[-1]))
    routed = routing(facts, region, given, count := int(shape(stacks[0])[0]))
    return MLP(
        **facts.place("mlp", out, region.owner),
        values={name: values[name] for name in MLP.stages if name in values} | routed.values,
        weights=_weights(facts, products, shape(given)[-1]) | routed.weights,
        form="experts",
        activation=activations[0].function if whole is None else str(argument(whole, 7, "activation", "silu")),
        experts=count,
        chosen=routed.chosen,
    )


def _products(facts: Facts, region: Region, stacks: list[fx.Node]) -> list[_Product]:
    found = (_multiplies(node, stacks) for node in region.nodes if opname(node) in _PRODUCTS)
    return [replace(p, bias=_bias(facts, p.node)) for p in found if p is not None]


def _inside(facts: Facts, node: fx.Node, stacks: list[fx.Node]) -> list[_Product]:
    """The two products of the one operator: x (T, d), weights, indices, gate_up, down and their biases."""
    found: list[_Product] = []
    for at, name in ((3, "gate_up"), (4, "down")):
        bias = argument(node, at + 2, f"{name}_bias")
        product = _behind(node, argument(node, at, name), stacks, last=True)
        if product is not None:
            named = facts.program.weight_name(bias) if isinstance(bias, fx.Node) else None
            found.append(replace(product, bias=named))
    return found


def _multiplies(node: fx.Node, stacks: list[fx.Node]) -> _Product | None:
    """The stack that a product reads, through views of it."""
    operands = node.all_input_nodes
    for at, operand in enumerate(operands):
        last = opname(node) == "linear" or (len(operands) > 1 and at == 0)  # else the rows stand on the left of it
        if (found := _behind(node, operand, stacks, last=last)) is not None:
            return found if opname(node) != "einsum" else replace(found, contracted=0)
    return None


def _behind(node: fx.Node, operand: object, stacks: list[fx.Node], *, last: bool) -> _Product | None:
    """The product with an operand that shows a stack; ``last``: it sums over the last axis of the operand."""
    stack = operand
    while isinstance(stack, fx.Node) and stack not in stacks:
        if stack.op != "call_function" or opname(stack) not in _ON_THE_WAY:
            return None
        if opname(stack) in TRANSPOSES:
            last ^= swaps(stack)
        stack = stack.all_input_nodes[0]
    if not isinstance(stack, fx.Node) or not isinstance(operand, fx.Node):
        return None
    return _Product(node, stack, operand, 2 if last else 1)


def _rows(product: _Product) -> fx.Node:
    """What is multiplied with the matrices: (S, c), before an axis was put in for a batched product."""
    rows = next(n for n in product.node.all_input_nodes if n is not product.operand)
    return rows.all_input_nodes[0] if opname(rows) == "unsqueeze" else rows


def _bias(facts: Facts, product: fx.Node) -> str | None:
    """The parameter with a row for each expert that is added to a product, through views of both."""
    node = product
    for _ in range(_LONGEST):
        if len(node.users) != 1:
            return None
        before, node = node, next(iter(node.users))
        if opname(node) != "add":
            if opname(node) in _ON_THE_WAY:
                continue
            return None
        added = next((n for n in node.all_input_nodes if n is not before), None)
        while added is not None and opname(added) in _ON_THE_WAY:
            added = added.all_input_nodes[0]
        parameter = None if added is None else facts.program.weight(added)
        return _name(facts, added) if added is not None and parameter is not None and parameter.dim() == 2 else None
    return None


def _weights(facts: Facts, products: list[_Product], width: int | torch.SymInt) -> dict[str, Weight]:
    """The stacks by role: the first products are gate and up (or both in one), the last is down."""
    by_stack = {product.stack: product for product in reversed(products)}
    stacks = list(dict.fromkeys(product.stack for product in products))
    names = {2: ["up", "down"], 3: ["gate", "up", "down"]}.get(len(stacks), [f"up{i}" for i in range(len(stacks))])
    tensors = [facts.program.weight(stack) for stack in stacks]
    if len(stacks) == 2 and tensors[0] is not None and tensors[1] is not None:
        names[0] = "gate_up" if tensors[0].numel() == 2 * tensors[1].numel() else "up"
    weights: dict[str, Weight] = {}
    for name, stack, tensor in zip(names, stacks, tensors, strict=True):
        assert tensor is not None
        product = by_stack[stack]
        features = tensor.shape[1] if name == "down" else tensor.shape[2]  # of "out_in"
        out_in = product.contracted == 2 if product.contracted else features == width
        weights[name] = Weight(_name(facts, stack), "out_in" if out_in else "in_out", product.bias)
    return weights


def _name(facts: Facts, stack: fx.Node) -> str:
    return str(facts.program.weight_name(stack))
