"""file: a region as the text of a Python file: header, kernels, launcher, the same in ATen, the operator."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx

from gatecc.codegen.regions.aten import aten_line, print_aten, print_function
from gatecc.codegen.regions.expressions import FUNCTIONS
from gatecc.codegen.regions.part import print_part
from gatecc.codegen.regions.region import Region
from gatecc.codegen.regions.steps import Step, in_order

FORM = "3"  # of the files: what was printed in another is not used
PAGE = '''"""{title}

{notes}Printed by gatecc from this graph (gatecc.codegen.regions); another graph is another file. On a GPU {runs},
on a CPU the ATen form, which Inductor fuses. Sizes of blocks were chosen when the file was printed.

{graph}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

{functions}from gatecc.codegen.regions.runtime import Blocks, cdiv, choose, parts_of, precision

{parts}

{reference}
'''
OPERATOR = """
@triton_op("gatecc_regions::{name}", mutates_args=())
def operator({typed}) -> {returns}:
    found = reference({inputs}) if {leader}.device.type == "cpu" else launch({inputs})
    return {result}
"""
GRADIENT = """

def gradient(*tensors):
    from gatecc.codegen.regions.build import load

    found = load("{file}").operator(*tensors)
    return (found,) if isinstance(found, Tensor) else found


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.results = [(x.shape, x.dtype) for x in ((output,) if isinstance(output, Tensor) else output)]


def _backward(ctx, *grads):
    device = ctx.saved_tensors[0].device
    grads = [
        torch.zeros(size, dtype=dtype, device=device) if g is None else g
        for g, (size, dtype) in zip(grads, ctx.results, strict=True)
    ]
    tensors = [x.contiguous() for x in (*ctx.saved_tensors, *grads)]
    found = dict(zip({places}, gradient(*tensors), strict=True))
    return tuple(map(found.get, range({inputs})))


operator.register_autograd(_backward, setup_context=_setup)
"""


class Page(NamedTuple):
    """A file: its name, which holds a hash of what it computes, and its text."""

    name: str
    text: str


class Derivative(NamedTuple):
    """The gradient of a region: the name of its file, and for which inputs it has one."""

    file: str
    there: tuple[bool, ...]


def print_page(region: Region, derivative: Derivative | None = None) -> Page:
    """The file of a region. Raises RefusedError if it has no kernel."""
    after = "" if derivative is None else _gradient(derivative)
    return _page(region, _title(region), "the kernel runs", print_part(region), after)


def print_steps(region: Region, steps: Sequence[Step]) -> Page:
    """The file of several kernels that run one after the other, with ATen between them for what has none. ``region``:
    all of it, of which only the graph must be printable in ATen."""
    parts = "\n\n".join(print_part(step.region, f"_{i}") for i, step in enumerate(steps))
    names = [n.name for n in region.inputs]
    lines = list[str]()
    for found in in_order(region.graph, steps):
        if isinstance(found, fx.Node):
            lines.append(aten_line(found, region.rows))
            continue
        step = steps[found]
        given = ", ".join(n.name for n in step.inputs)
        lines.append(f"{', '.join(n.name for n in step.results)}, = launch_{found}({given}, wrap=wrap)")
    head = f"def launch({', '.join(names)}, wrap=wrap_triton):"
    launch = print_function(head, lines, region.graph, region.leader)
    title = f"A gradient, by {len(steps)} kernel(s)."
    return _page(
        region, title, "its kernels run" if steps else "as on a CPU", f"{parts}\n\n{launch}" if parts else launch
    )


def _page(region: Region, title: str, runs: str, parts: str, after: str = "") -> Page:
    inputs, leader = [n.name for n in region.inputs], region.leader
    text = PAGE.format(
        title=title,
        notes="".join(f"    {note}\n" for note in region.notes) + "\n" * bool(region.notes),
        runs=runs,
        graph="\n".join(f"    {line}" for line in graph_lines(region.graph)),
        functions=imported_functions(parts),
        parts=parts,
        reference=print_aten(region.graph, "reference", region.rows, leader),
    )
    name = f"region_{hashlib.sha256((FORM + text + after).encode()).hexdigest()[:16]}"
    one = len(region.outputs) == 1
    text += OPERATOR.format(
        name=name,
        typed=", ".join(f"{n}: Tensor" for n in inputs),
        returns="Tensor" if one else f"tuple[{', '.join(['Tensor'] * len(region.outputs))}]",
        inputs=", ".join(inputs),
        leader=leader.name,
        result="found[0]" if one else "found",
    )
    return Page(name, text + after)


def _title(region: Region) -> str:
    products = f"{len(region.products)} product(s) and " if region.products else ""
    return (
        f"A region of {products}{len(region.calls) - len(region.products)} operators on rows of {region.width} columns."
    )


def graph_lines(graph: fx.Graph) -> list[str]:
    """The graph with shapes and dtypes, a line a node."""
    found: list[str] = []
    for node in graph.nodes:
        value = node.meta.get("val")
        kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if hasattr(value, "dtype") else ""
        if node.op == "placeholder":
            found.append(f"{node.name}: {kind}")
        elif node.op == "call_function":
            found.append(f"{node.name} = {node.target}({', '.join(map(str, node.args))}) {kind}".rstrip())
        elif node.op == "output":
            found.append(f"return {', '.join(map(str, node.args[0]))}")
    return [line.replace('"""', "'''").replace("\\", "/") for line in found]


def imported_functions(kernels: str) -> str:
    """The line that imports those that kernels call."""
    names = sorted(name for name in FUNCTIONS.values() if re.search(rf"(?<![.\w]){name}\(", kernels))
    return f"from gatecc.codegen.regions.kernels.functions import {', '.join(names)}\n" if names else ""


def _gradient(derivative: Derivative) -> str:
    places = tuple(i for i, there in enumerate(derivative.there) if there)
    return GRADIENT.format(file=derivative.file, places=places, inputs=len(derivative.there))
