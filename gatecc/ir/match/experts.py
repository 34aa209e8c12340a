"""Experts: MLPs whose weights are stacked along an expert axis (Mixtral, Qwen-MoE, GPT-OSS in transformers).

However the tokens are dispatched (grouped products, gathered weights, a loop), the owner of the stacked parameters is
the site: what enters it with the shape of what leaves it is the stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.projection import CONV_OPS
from gatecc.ir.match.region import Region, regions
from gatecc.ir.match.registry import matcher
from gatecc.ir.match.shapes import same_shape
from gatecc.ir.ops import CASTS, SAME_SHAPE, TRANSPOSES, VIEWS, opname
from gatecc.ir.program import shape
from gatecc.ir.refusals import refuse
from gatecc.ir.site import MLP, Refusal, Weight

_PRODUCTS = frozenset("bmm baddbmm matmul mm addmm linear einsum _grouped_mm grouped_mm_fallback".split())


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
    bent = [facts.nonlinearities[node] for node in region.nodes if node in facts.nonlinearities]
    products = [(node, stack) for node in region.nodes if (stack := _multiplies(node, stacks)) is not None]
    if not bent or len({stack for _, stack in products}) < 2:
        return None  # stacked weights of another kind, such as one matrix per head
    outs = region.leaves(facts)
    pairs = [(given, out) for out in outs for given in region.enters(facts) if same_shape(given, out)]
    if len(pairs) != 1:
        return refuse("GCC144", "mlp", region.nodes[0], f"{len(outs)} values leave it", owner=region.owner)
    given, out = pairs[0]
    last = products[-1][0]
    hidden = next(n for n in last.all_input_nodes if n in facts.data)
    place = facts.place("mlp", out, region.owner)
    values = {"in": facts.value(given), "hidden": facts.value(hidden), "out": facts.value(out)}
    weights = _weights(facts, products, shape(given)[-1])
    return MLP(**place, values=values, weights=weights, form="experts", activation=bent[0].function)


def _multiplies(node: fx.Node, stacks: list[fx.Node]) -> fx.Node | None:
    """The stack that a product reads, through views of it."""
    if opname(node) not in _PRODUCTS:
        return None
    for operand in node.all_input_nodes:
        while operand.op == "call_function" and opname(operand) in VIEWS | CASTS | TRANSPOSES | SAME_SHAPE:
            operand = operand.all_input_nodes[0]
        if operand in stacks:
            return operand
    return None


def _weights(facts: Facts, products: list[tuple[fx.Node, fx.Node]], width: int | torch.SymInt) -> dict[str, Weight]:
    """The stacks by role: the first products are gate and up (or both in one), the last is down."""
    stacks = list(dict.fromkeys(stack for _, stack in products))
    names = {2: ["up", "down"], 3: ["gate", "up", "down"]}.get(len(stacks), [f"up{i}" for i in range(len(stacks))])
    tensors = [facts.program.weight(stack) for stack in stacks]
    if len(stacks) == 2 and tensors[0] is not None and tensors[1] is not None:
        names[0] = "gate_up" if tensors[0].numel() == 2 * tensors[1].numel() else "up"
    weights: dict[str, Weight] = {}
    for name, stack, tensor in zip(names, stacks, tensors, strict=True):
        assert tensor is not None
        features = tensor.shape[1] if name == "down" else tensor.shape[2]  # of "out_in"
        weights[name] = Weight(_name(facts, stack), "out_in" if features == width else "in_out")
    return weights


def _name(facts: Facts, stack: fx.Node) -> str:
    return str(facts.program.weight_name(stack))
