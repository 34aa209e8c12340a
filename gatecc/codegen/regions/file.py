"""file: a region as the text of a Python file: header, kernel, launcher, the same in ATen, the operator."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from gatecc.codegen.regions.aten import print_aten
from gatecc.codegen.regions.expressions import FUNCTIONS
from gatecc.codegen.regions.matmul import print_matmul
from gatecc.codegen.regions.region import Region, dtype, rows_of, shape
from gatecc.codegen.regions.rowwise import Printed, print_rowwise

FORM = "2"  # of the files: what was printed in another is not used
PAGE = '''"""{title}

{notes}Printed by gatecc from this graph (gatecc.codegen.regions); another graph is another file. On a GPU the kernel
runs, on a CPU the ATen form, which Inductor fuses. Sizes of blocks were chosen when the file was printed.

{graph}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

{functions}from gatecc.codegen.regions.runtime import Blocks, cdiv, choose, precision

# By make of GPU: for up to so many rows, these blocks.
BLOCKS = {blocks}


{kernel}

def launch({inputs}, wrap=wrap_triton):
    """The results, by the kernel."""
    {contiguous}
    count = {leader}.numel() // {leader}.shape[-1]
    blocks = choose(BLOCKS, count)
{fresh}
    wrap(kernel)[{grid}](
        {inputs}, {outputs}, count{strides},
        BLOCK_ROWS=blocks.rows, BLOCK_COLS=blocks.cols{constants},
        num_warps=blocks.warps, num_stages=blocks.stages,
    )
    return ({outputs},)


{reference}
'''
OPERATOR = """
@triton_op("gatecc_regions::{name}", mutates_args=())
def operator({typed}) -> {returns}:
    found = reference({inputs}) if {leader}.device.type == "cpu" else launch({inputs})
    return {result}
"""
GRADIENT = """

{derivative}

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
    found = dict(zip({places}, [{results}], strict=True))
    return tuple(map(found.get, range({inputs})))


operator.register_autograd(_backward, setup_context=_setup)
"""


KERNEL = """def kernel_gradient(*tensors):
    from gatecc.codegen.regions.build import load

    found = load("{file}").operator(*tensors)
    return (found,) if isinstance(found, Tensor) else found
"""


class Derivative(NamedTuple):
    """The gradient of a region. ``there``: for which inputs it has one. ``rest``: the graph of those that are computed
    in ATen; ``file``: the name of the file whose kernel computes the others, at the places ``by_kernel``."""

    there: tuple[bool, ...]
    rest: fx.Graph | None
    by_kernel: tuple[int, ...] = ()
    file: str | None = None


class Page(NamedTuple):
    """A file: its name, which holds a hash of what it computes, and its text."""

    name: str
    text: str


def print_page(region: Region, derivative: Derivative | None = None) -> Page:
    """The file of a region. Raises RefusedError if it has no kernel."""
    printed = print_matmul(region) if region.products else print_rowwise(region)
    inputs, outputs = [n.name for n in region.inputs], [f"out{i}" for i in range(len(region.outputs))]
    leader = region.leader
    text = PAGE.format(
        title=_title(region),
        notes="".join(f"    {note}\n" for note in region.notes) + "\n" * bool(region.notes),
        graph="\n".join(f"    {line}" for line in _lines(region.graph)),
        blocks=_blocks(printed),
        functions=_functions(printed.kernel),
        kernel=printed.kernel,
        inputs=", ".join(inputs),
        outputs=", ".join(outputs),
        leader=leader.name,
        contiguous=_contiguous(region),
        fresh="\n".join(_fresh(region, n, out) for n, out in zip(region.outputs, outputs, strict=True)),
        grid=printed.grid,
        strides=printed.strides,
        constants=printed.constants,
        reference=print_aten(region.graph, "reference", region.rows, leader),
    )
    after = "" if derivative is None else _gradient(region, derivative)
    name = f"region_{hashlib.sha256((FORM + text + after).encode()).hexdigest()[:16]}"
    one = len(outputs) == 1
    text += OPERATOR.format(
        name=name,
        typed=", ".join(f"{n}: Tensor" for n in inputs),
        returns="Tensor" if one else f"tuple[{', '.join(['Tensor'] * len(outputs))}]",
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


def _lines(graph: fx.Graph) -> list[str]:
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


def _functions(kernel: str) -> str:
    """The line that imports those that a kernel calls."""
    names = sorted(name for name in FUNCTIONS.values() if re.search(rf"\b{name}\(", kernel))
    return f"from gatecc.codegen.regions.kernels.functions import {', '.join(names)}\n" if names else ""


def _blocks(printed: Printed) -> str:
    rows = [
        f'    "{make}": [' + ", ".join(f"({most}, Blocks{tuple(b)!r})" for most, b in choices) + "],"
        for make, choices in printed.blocks.items()
    ]
    return "\n".join(["{", *rows, "}"])


def _contiguous(region: Region) -> str:
    """Weights are read by their strides, everything else must lie in order."""
    weights = {a for p in region.products for a in _matrices(p)}
    plain = [n.name for n in region.inputs if n not in weights]
    return f"{', '.join(plain)}, = {', '.join(f'{n}.contiguous()' for n in plain)}," if plain else ""


def _matrices(product: fx.Node) -> Sequence[fx.Node]:
    right: Any = product.args[-1]
    while right.op == "call_function":
        right = right.args[0]
    return (right,)


def _fresh(region: Region, node: fx.Node, out: str) -> str:
    """The line that makes room for a result."""
    sizes, lead = shape(node), f"*{region.leader.name}.shape[:-1]"
    if rows_of(sizes, region.rows) == "all" and not (sizes[-1] in (1, region.width) and _leads(sizes, region)):
        written = [lead]
    elif sizes[:-1] == region.rows and shape(region.leader)[:-1] == region.rows:
        written = [lead, str(sizes[-1])]
    else:
        written = ["count", str(sizes[-1])]
    return f"    {out} = torch.empty([{', '.join(written)}], dtype={dtype(node)}, device={region.leader.name}.device)"


def _leads(sizes: tuple[int, ...], region: Region) -> bool:
    return rows_of(sizes[:-1], region.rows) == "all"


def _gradient(region: Region, derivative: Derivative) -> str:
    printed, results = list[str](), list[str]()
    if derivative.file is not None:
        printed.append(KERNEL.format(file=derivative.file))
        results.append("*kernel_gradient(*tensors)")
    if derivative.rest is not None:
        leader = next(n for n in derivative.rest.nodes if n.name == region.leader.name)
        printed.append(print_aten(derivative.rest, "gradient", region.rows, leader))
        results.append("*gradient(*tensors)")
    learned = [i for i, there in enumerate(derivative.there) if there]
    others = [i for i in range(len(learned)) if i not in derivative.by_kernel]
    places = tuple(learned[i] for i in (*derivative.by_kernel, *others))
    return GRADIENT.format(
        derivative="\n\n".join(printed), results=", ".join(results), places=places, inputs=len(derivative.there)
    )
