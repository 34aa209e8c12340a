"""Attention and what is made of its heads, as one operator with a kernel that is printed for it.

``gatecc::attention`` has gates of three activations. What else is computed of the heads, elementwise or along their
channels (a norm of each head before its gate, a gate of another form, a product with several tensors), is printed from
its FX nodes behind the main loop: the heads are never written. Gradients: the heads are computed again, what is made of
them is differentiated as a region (gatecc.codegen.regions), attention by its own kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.codegen.regions.alive import most_alive
from gatecc.codegen.regions.aten import print_aten
from gatecc.codegen.regions.body import Body, Space, Value
from gatecc.codegen.regions.build import build, load, write
from gatecc.codegen.regions.file import Page, graph_lines, imported_functions
from gatecc.codegen.regions.region import RefusedError, Region, dtype, region_of, rows_of, shape
from gatecc.codegen.triton.sizes import block_of
from gatecc.ops.attention.arguments import Arguments, arguments
from gatecc.ops.attention.triton.dispatch import LAUNCHER, refusal
from gatecc.ops.attention.triton.tables import blocks

FORM = "1"
HELD = 192  # registers of a thread for values of a block, beside which 255 leave room for places and masks
FEW = 16  # queries: up to so many are a step of a decoder, whose keys are split among programs
PAGE = '''"""Attention and what is made of its heads, x0.

{notes}Printed by gatecc from this graph (gatecc.ops.attention.region); another graph is another file. On a GPU the
kernel runs, on a CPU gatecc::attention and the ATen form.

{graph}
"""

import torch
import triton
import triton.language as tl

from gatecc.ops.attention.region import launched
from gatecc.ops.attention.triton.kernels.forward import attended
from gatecc.ops.attention.triton.kernels.tiles import LN2, place, put
{functions}
OPTIONS = {options}
FOLLOWING = "{following}"  # the file of what is made of the heads, and of its gradient


@triton.jit
def kernel(q, k, v, bias, sinks, {others}out, logsumexp, listed, rule,
           D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           LIST_Q: tl.constexpr, LIST_K: tl.constexpr, PRECISION: tl.constexpr):
    batch, head, rows, row_mask, heads, peak, total = attended(
        q, k, v, bias, sinks, listed, rule, D, E, BD, BE, BM, BN, LIST_Q, LIST_K, PRECISION
    )
    cols = tl.arange(0, BE)
    col_mask = cols < E
    mask = row_mask[:, None] & col_mask[None, :]
{lines}
    put(place(out, batch, head), out, rows, cols, row_mask, {value}, E)
    places = (batch * rule.heads + head) * rule.queries + rows
    tl.store(logsumexp + places, (peak + tl.log2(total)) * LN2, mask=row_mask)


def launch(q, k, v, bias, sinks, {others}blocks=None, block_sizes=(64, 64)):
    """The result and the logsumexp, by the kernel."""
    return launched(kernel, (q, k, v, None, bias, sinks), [{others}], blocks, block_sizes, OPTIONS)


{reference}
'''


class _Heads(Body):
    """Prints behind the main loop of attention, where inputs are read by the strides of their four axes."""

    def load(self, node: fx.Node) -> Value:
        """Read an input for the rows of a head."""
        sizes, name = shape(node), node.name
        over, wide = rows_of(sizes[:-1], self.region.rows), sizes[-1:] == (self.space.width,)
        if len(sizes) > 4 or over == "other" or (sizes and not wide and sizes[-1] != 1):
            raise RefusedError(f"an input of shape {list(sizes)} beside heads of {self.space.width} channels")
        rows = bool(sizes) and over != "none"
        place, masks = f"{name}.at", list[str]()
        if rows:
            place += f" + batch * {name}.batch + head * {name}.head + rows[:, None] * {name}.token"
            masks.append("row_mask[:, None]")
        if wide:
            place += f" + cols[None, :] * {name}.channel"
            masks.append("col_mask[None, :]")
        mask = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        text = f"tl.load({place}{mask})" + (" != 0" if dtype(node) == torch.bool else ".to(tl.float32)")
        kind = "tile" if rows and wide else "column" if rows else "row" if wide else "scalar"
        return self.say(Value(self.name(node), kind), text)


def attention_region(
    following: Callable[..., Tensor],
    heads: Tensor,
    others: Sequence[Tensor] = (),
    notes: Sequence[str] = (),
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> ModuleType:
    """The file of attention and what follows it: ``operator``, ``launch``, ``kernel``, ``reference``.

    Args:
        following: of heads (B, H, N, E) and other tensors, whose axes broadcast to these: one result, of their shape.
        heads, others: tensors of the shapes and dtypes that they will have, fake ones will do. Batches and lengths may
            be others later, where the example is not 1.
        notes: stand in the header.
        scale, causal, window, softcap: as of gatecc.ops.attention.attention.

    ``operator(q, k, v, bias, sinks, *others)`` gives the result and the logsumexp of the scores. Raises RefusedError
    where no kernel can be printed.
    """
    region = region_of(following, (heads, *others), notes)
    if len(shape(region.inputs[0])) != 4 or region.products:
        raise RefusedError("what follows attention is elementwise, or along the channels of a head")
    (result, *more) = region.outputs
    if more or shape(result) != shape(region.inputs[0]) or dtype(result) != dtype(region.inputs[0]):
        raise RefusedError("what follows attention has one result, in the form of the heads")
    options = {"scale": scale, "causal": causal, "window": window, "softcap": softcap}
    file = str(build(following, (heads, *others), notes).module.__name__).removeprefix("gatecc_regions_")
    page = _page(region, result, options, file)
    module = load(write(page))
    if not hasattr(module, "operator"):
        vars(module)["operator"] = _registered(page.name, module, len(others))
    return module


def _page(region: Region, result: fx.Node, options: dict[str, Any], following: str) -> Page:
    body = _Heads(
        region,
        Space("rows", "cols", "row_mask", "col_mask", region.width),
        {region.inputs[0]: Value("heads", "tile")},
    )
    value = body.value(result)
    if value.kind != "tile" or value.literal:
        raise RefusedError("a result that is the same for all channels of a head")
    tiles = most_alive(body.lines, body.tiles())
    block = blocks("attend", dtype(result), max(64, block_of(region.width)))
    if tiles * block.queries * block_of(region.width) > HELD * 32 * block.warps:
        raise RefusedError(f"{tiles} values of each channel are held at once behind the main loop of attention")
    lines = "".join(f"    {line}\n" for line in body.lines)
    text = PAGE.format(
        notes="".join(f"    {note}\n" for note in region.notes) + "\n" * bool(region.notes),
        graph="\n".join(f"    {line}" for line in graph_lines(region.graph)),
        functions=imported_functions(lines),
        options=repr(options),
        following=following,
        others="".join(f"{n.name}, " for n in region.inputs[1:]),
        lines=lines,
        value=value.text,
        reference=print_aten(region.graph, "reference", region.rows, region.leader),
    )
    return Page(f"attention_{hashlib.sha256((FORM + text).encode()).hexdigest()[:16]}", text)


def launched(
    kernel: Any,
    tensors: Sequence[Tensor | None],
    others: Sequence[Tensor],
    blocks: Tensor | None,
    block_sizes: Sequence[int],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of a file."""
    q, k, v, *rest = tensors
    assert q is not None
    assert k is not None
    assert v is not None
    launch: Any = LAUNCHER.module()
    return launch.forward_then(
        arguments(q, k, v, *rest, blocks=blocks, block_sizes=block_sizes, **options), kernel, others
    )


_LIBRARY = torch.library.Library("gatecc_regions", "FRAGMENT")


def _registered(name: str, module: ModuleType, others: int) -> Any:
    """The operator of a file."""
    more = "".join(f", Tensor x{i + 1}" for i in range(others))
    _LIBRARY.define(f"{name}(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks{more}) -> (Tensor, Tensor)")

    def read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None) -> Arguments:
        return arguments(q, k, v, None, bias, sinks, **module.OPTIONS)

    def run(*given: Any) -> tuple[Tensor, Tensor]:
        a = read(*given[:5])
        few = a.q.size(2) <= FEW
        if a.q.device.type == "cuda" and not few and refusal(a) is None:
            return module.launch(*given)
        heads, logsumexp = _plain(given, module)
        following = load(module.FOLLOWING).operator(heads.contiguous(), *given[5:])
        out = a.new_output()
        return out.copy_(following), logsumexp

    def fake(*given: Any) -> tuple[Tensor, Tensor]:
        a = read(*given[:5])
        return a.new_output(), a.new_logsumexp()

    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        heads, logsumexp = _plain(given, module)
        rest: tuple[Tensor | None, ...] = (None,) * others
        if grad is None:
            of_heads = torch.zeros_like(heads)
        else:
            pulled = load(module.FOLLOWING).gradient(heads.contiguous(), *map(_ordered, given[5:]), grad.contiguous())
            learned = iter(pulled)
            of_heads, *found = (next(learned) if x.is_floating_point() else None for x in (heads, *given[5:]))
            rest = tuple(found)
        needs = [*ctx.needs_input_grad[:3], False, *ctx.needs_input_grad[3:5]]
        needs = [need and (i < 3 or given[i - 1] is not None) for i, need in enumerate(needs)]
        q, k, v, bias, sinks = given[:5]
        tensors = (of_heads, grad_logsumexp, heads, logsumexp, q, k, v, None, bias, sinks)
        dq, dk, dv, _, dbias, dsinks = torch.ops.gatecc.attention_backward(*tensors, needs=needs, **module.OPTIONS)
        found = zip((dq, dk, dv, dbias, dsinks), (*needs[:3], *needs[4:]), strict=True)
        return (*(x if need else None for x, need in found), *rest)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gatecc_regions::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"gatecc_regions::{name}", backward, setup_context=setup, lib=_LIBRARY)
    return getattr(torch.ops.gatecc_regions, name)


def _plain(given: Sequence[Any], module: ModuleType) -> tuple[Tensor, Tensor]:
    """The heads before anything is made of them."""
    q, k, v, bias, sinks = given[:5]
    return torch.ops.gatecc.attention(q, k, v, None, bias, sinks, **module.OPTIONS)


def _ordered(x: Tensor) -> Tensor:
    return x.contiguous()
