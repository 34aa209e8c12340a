"""part: one kernel of a file with its blocks and the function that launches it."""

from __future__ import annotations

from torch import fx

from gatecc.codegen.regions.chain import operand
from gatecc.codegen.regions.matmul import print_matmul
from gatecc.codegen.regions.over_rows import is_row_product, is_row_sum, print_sums
from gatecc.codegen.regions.region import RefusedError, Region, dtype, rows_of, shape
from gatecc.codegen.regions.rowwise import Printed, print_rowwise

PART = '''# By make of GPU: for up to so many rows, these blocks.
BLOCKS{number} = {blocks}


{kernel}

def launch{number}({inputs}, wrap=wrap_triton):
    """The results, by the kernel."""
    {contiguous}
    {counts} = {numbers}
    blocks = choose(BLOCKS{number}, count)
{fresh}
    wrap(kernel{number})[{grid}](
        {inputs}, {outputs}, {counts}{strides},
        BLOCK_ROWS=blocks.rows, BLOCK_COLS=blocks.cols{constants},
        num_warps=blocks.warps, num_stages=blocks.stages,
    )
{finish}    return ({outputs},)
'''


def print_part(region: Region, number: str = "") -> str:
    """Kernel and launcher. ``number`` stands behind their names. Raises RefusedError if there is no kernel."""
    printed, leader = print_kernel(region), region.leader.name
    sizes = [f"{leader}.shape[{i}]" for i in range(1, printed.counts.count(",") + 1)]
    if sizes and len(shape(region.leader)) <= len(region.rows):
        raise RefusedError("an input that lacks some leading axes, and none that has them all")
    outputs = [f"out{i}" for i in range(len(region.outputs))]
    fresh = printed.fresh or [_fresh(region, n, out) for n, out in zip(region.outputs, outputs, strict=True)]
    return PART.format(
        number=number,
        blocks=_blocks(printed),
        kernel=printed.kernel.replace("def kernel(", f"def kernel{number}(", 1),
        inputs=", ".join(n.name for n in region.inputs),
        outputs=", ".join(outputs),
        counts=printed.counts,
        numbers=", ".join([f"{leader}.numel() // {leader}.shape[-1]", *sizes]),
        contiguous=_contiguous(region),
        fresh="\n".join(f"    {line}" for line in fresh),
        finish="".join(f"    {line}\n" for line in printed.finish),
        grid=printed.grid,
        strides=printed.strides,
        constants=printed.constants,
    )


def print_kernel(region: Region) -> Printed:
    """The kernel of a region of any form."""
    if any(is_row_product(n) or is_row_sum(n) for n in region.outputs):
        return print_sums(region)
    return print_matmul(region) if region.products else print_rowwise(region)


def _blocks(printed: Printed) -> str:
    rows = [
        f'    "{make}": [' + ", ".join(f"({most}, Blocks{tuple(b)!r})" for most, b in choices) + "],"
        for make, choices in printed.blocks.items()
    ]
    return "\n".join(["{", *rows, "}"])


def _contiguous(region: Region) -> str:
    """Weights are read by their strides, everything else must lie in order."""
    weights = {operand(p) for p in region.products}
    plain = [n.name for n in region.inputs if n not in weights]
    return f"{', '.join(plain)}, = {', '.join(f'{n}.contiguous()' for n in plain)}," if plain else ""


def _fresh(region: Region, node: fx.Node, out: str) -> str:
    """The line that makes room for a result."""
    sizes, lead = shape(node), f"*{region.leader.name}.shape[:-1]"
    if rows_of(sizes, region.rows) == "all" and not (sizes[-1] in (1, region.width) and _leads(sizes, region)):
        written = [lead]
    elif sizes[:-1] == region.rows and shape(region.leader)[:-1] == region.rows:
        written = [lead, str(sizes[-1])]
    else:
        written = ["count", str(sizes[-1])]
    return f"{out} = torch.empty([{', '.join(written)}], dtype={dtype(node)}, device={region.leader.name}.device)"


def _leads(sizes: tuple[int, ...], region: Region) -> bool:
    return rows_of(sizes[:-1], region.rows) == "all"
