"""Linear attention in ONNX: a form of the recurrence, and what it does not know put around it in ATen.

That is heads that are shared, padding, the normaliser, the other direction. The recurrence is
``com.microsoft::LinearAttention`` of ONNX Runtime, the same operator of opset 27, or spelled out (``onnx_forms``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError
from gatecc.ir.ops import named
from gatecc.ops.linear_attention import gates
from gatecc.ops.linear_attention.arguments import Arguments, arguments
from gatecc.ops.linear_attention.onnx_forms import OPSET27, ORT, Recurrence, spelled_out
from gatecc.ops.registry import Target


def _check(node: fx.Node) -> None:
    """Raise ExportError for what the form lacks."""
    if named(node, "cu_seqlens") is not None:
        raise _lacking(node, "packed sequences (cu_seqlens)", "give each sequence a row of the batch")
    if node.all_input_nodes[0].meta["val"].dtype == torch.float64:
        raise _lacking(node, "float64", "export model.float()")


def _fixed(node: fx.Node) -> Iterator[Any]:
    """Heads and channels: attributes of the node, or widths of what is packed for it."""
    for x in (n.meta["val"] for n in node.args[:5] if isinstance(n, fx.Node)):
        if x.dim() == 4:
            yield from (x.shape[1], x.shape[3])


def _lacking(node: fx.Node, found: str, do: str) -> ExportError:
    what = "linear attention in ONNX does not have this"
    return ExportError(what, where=place(node), found=found, do=do)


def lowering(recurrence: Recurrence) -> Lowering:
    """The form of ``gatecc::linear_attention`` around one of the recurrence."""

    def form(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None = None,
        beta: Tensor | None = None,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        scale: float | None = None,
        reverse: bool = False,
        normalize: bool = False,
        gate_normalizer: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        del cu_seqlens
        options: dict[str, Any] = {"scale": scale, "reverse": reverse, "normalize": normalize, "mask": mask}
        decay = None if log_decay is None else gates.log_decay(log_decay, gate_normalizer)
        return _around(recurrence, arguments(q, k, v, decay, beta, initial_state, **options))

    return Lowering(form, _check, _fixed)


def _around(recurrence: Recurrence, a: Arguments) -> tuple[Tensor, Tensor]:
    heads, keep = a.q.size(1), None if a.mask is None else a.mask[:, None, :, None]
    q, k, v = (_repeated(x.float(), heads) for x in (a.q, a.k, a.v))
    decay = None if a.log_decay is None else _decay(a, keep)
    strength = None if a.beta is None else _repeated(a.beta.float(), heads)
    k = k if keep is None else k * keep
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1) if a.normalize else v
    if a.reverse:
        q, k, v = q.flip(2), k.flip(2), v.flip(2)
        decay, strength = (None if x is None else x.flip(2) for x in (decay, strength))
    start = None if a.initial_state is None else a.initial_state.float()
    o, state = recurrence(a.rule, q, k, v, decay, strength, start, float(a.scale))
    o = o.flip(2) if a.reverse else o
    if a.normalize:
        total = o[..., -1:]
        o = o[..., :-1] / torch.where(total == 0, torch.ones_like(total), total)
    o = o if keep is None else o * keep
    return o.to(a.q.dtype), state


def _decay(a: Arguments, keep: Tensor | None) -> Tensor:
    """(B, H, N, Dk or 1), 0 at padding: nothing is forgotten there."""
    assert a.log_decay is not None
    g = _repeated(a.log_decay.float(), a.q.size(1))
    g = g.expand(*a.q.shape[:3], g.size(3))
    return g if keep is None else g.masked_fill(~keep, 0.0)


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)


FORMS: dict[Target, Lowering] = {
    "ort": lowering(ORT),
    "opset27": lowering(OPSET27),
    "portable": lowering(spelled_out),
}
