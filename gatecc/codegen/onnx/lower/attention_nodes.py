"""The nodes that attention becomes, and what each of them is given.

``GroupQueryAttention`` takes the rotary embedding, a window, a soft cap and one packed product; ``Attention`` of ONNX
Runtime the products of one value and the padding, ``MultiHeadAttention`` the biases of the products and the padding,
Attention of the standard any mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gatecc.codegen.onnx.lower.bias import Bias, write_bias
from gatecc.codegen.onnx.lower.lowering import Subject
from gatecc.codegen.onnx.lower.packing import one_projection, packed, tokens_first, unbiased
from gatecc.codegen.onnx.lower.rotation import Rotation
from gatecc.codegen.onnx.lower.sizes import key_counts, positions
from gatecc.codegen.onnx.lower.views import Views
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.program import fake
from gatecc.ir.site import Attention
from gatecc.ir.sizes import node_shape

_STEP = 16  # channels: the rotary embedding of GroupQueryAttention turns a multiple of so many


@dataclass(eq=False)
class Call:
    """One attention as the nodes take it: q, k, v are (B, heads, N, D) before any rotary embedding that they do."""

    site: Attention
    q: fx.Node
    k: fx.Node
    v: fx.Node
    rotation: Rotation | None = None
    kept_rotary: str = ""  # why the rotary embedding stays outside
    padding: fx.Node | None = None  # the input that is zero where a key is no token
    mask: fx.Node | None = None  # True where a query sees a key, where the node has to be told
    bias: Bias | None = None  # what is added to the scores

    @property
    def out(self) -> fx.Node:
        return self.site.core

    @property
    def widths(self) -> tuple[int, int]:
        """Of keys and values."""
        return int(node_shape(self.k)[-1]), int(node_shape(self.v)[-1])  # pyright: ignore[reportOptionalSubscript]


def write_attention(writer: Writer, subject: Subject, call: Call, views: Views) -> str:
    """Put the node in the place of the core; its name."""
    op, y = _form(subject, call)(writer, subject, call, views)
    shape = call.out.meta["val"].shape
    apart = writer.call(aten.reshape.default, y, [shape[0], shape[2], shape[1], shape[3]])
    call.out.replace_all_uses_with(writer.call(aten.transpose.int, apart, 1, 2))
    return op


def is_grouped(subject: Subject, site: Attention) -> bool:
    """Whether GroupQueryAttention takes it, if any node does."""
    k_width, v_width = (int((node_shape(site.values[name].node) or (0,))[-1]) for name in "kv")
    causal = site.mask.kind != "bidirectional"
    return subject.target == "ort" and causal and k_width == v_width and k_width % 8 == 0


def _form(subject: Subject, call: Call) -> Callable[..., tuple[str, fx.Node]]:
    """What writes the node."""
    if subject.target != "ort" or call.mask is not None:
        return _standard
    if call.bias is None and call.site.mask.kind != "bidirectional":
        return _grouped if is_grouped(subject, call.site) else _standard
    return _multi_head if is_multi_head(call) else _standard


def is_multi_head(call: Call) -> bool:
    """Whether MultiHeadAttention takes a call that has no mask; padding is nothing that another node takes."""
    equal = call.site.heads == call.site.kv_heads and fake_dtype(call.out) == torch.float32
    turned = call.rotation is not None and call.padding is None
    return equal and not turned and not call.site.soft_cap


def _multi_head(writer: Writer, subject: Subject, call: Call, views: Views) -> tuple[str, fx.Node]:
    site = call.site
    padding = seen = None
    if call.padding is not None:
        padding, seen = _padding(writer, subject, call.padding, fake_dtype(call.out))
    attributes: dict[str, Any] = {"num_heads": site.heads}
    one = None if call.rotation is not None else one_projection(writer, views, call.q, call.k, call.v)
    if call.rotation is not None:
        inputs, factor, op = [*_turned(writer, subject, call, views), None], 1.0, "MultiHeadAttention"
    elif one is not None:  # the node takes the products as well
        inputs, factor, op = list(one[0]), one[1], "Attention"
        of_keys, of_values = (site.heads * width for width in call.widths)
        if of_keys != of_values:
            attributes["qkv_hidden_sizes"] = [of_keys, of_keys, of_values]
    else:
        parts, bias, factor = unbiased(writer, views, call.q, call.k, call.v)
        inputs, op = [*parts, bias], "MultiHeadAttention"
    attributes["scale"] = float(site.scale or 0.0) * factor
    B, _, N, _ = call.out.meta["val"].shape
    shape = (B, N, site.heads * call.widths[1])
    if call.bias is not None:
        inputs += [*([None, None] if one is not None else [None]), write_bias(writer, call.bias)]
    else:
        inputs.append(padding)
    y = writer.shaped(f"com.microsoft::{op}", inputs, attributes, shape, fake_dtype(call.out))
    if seen is not None:  # of a sample without tokens the node takes all keys, torch none
        y = writer.call(aten.mul.Tensor, y, seen)
    told = " with its products" * (one is not None) + " with padding" * (padding is not None)
    return op + told + " and rotary before it" * (call.rotation is not None) + _biased(call), y


def _padding(writer: Writer, subject: Subject, given: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    """What MultiHeadAttention takes, (B, M), and 1 for samples that have a token, else 0, (B, 1, 1)."""
    key = ("padding", given)
    if key not in subject.shared:
        padding = writer.shaped("Cast", [given], {"to": 6}, tuple(given.meta["val"].shape), torch.int32)
        most = writer.call(aten.unsqueeze.default, writer.call(aten.amax.default, padding, [1], True), 2)
        some = writer.call(aten._to_copy.default, writer.call(aten.gt.Scalar, most, 0), dtype=dtype)
        subject.shared[key] = padding, some
    return subject.shared[key]


def _grouped(writer: Writer, subject: Subject, call: Call, views: Views) -> tuple[str, fx.Node]:
    site, width = call.site, call.widths[0]
    inside = call.rotation is not None and call.rotation.width % _STEP == 0
    factor = 1.0
    if call.rotation is None or inside:
        (q, k, v), factor = packed(writer, views, call.q, call.k, call.v)
    else:
        q, k, v = _turned(writer, subject, call, views)
    counts = key_counts(writer, subject, call.out, call.q)
    cos, sin = _caches(writer, call) if inside else (None, None)
    window = site.mask.window if site.mask.kind == "sliding_window" else None
    attributes: dict[str, Any] = {
        "num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": float(site.scale or 0.0) * factor,
        "do_rotary": int(inside),
        "rotary_interleaved": int(call.rotation is not None and call.rotation.interleaved),
        "local_window_size": window or -1,
    }
    if site.soft_cap:
        attributes["softcap"] = float(site.soft_cap)
    B, _, N, _ = call.out.meta["val"].shape
    cache = (B, site.kv_heads, N, width)
    y, *_ = writer.several(
        "com.microsoft::GroupQueryAttention",
        [q, k, v, None, None, *counts, cos, sin],
        attributes,
        [(B, N, site.heads * width), cache, cache],
        call.out.meta["val"].dtype,
    )
    return "GroupQueryAttention" + _told(call), y


def _biased(call: Call) -> str:
    return " with a bias" * (call.bias is not None)


def _told(call: Call) -> str:
    inside = ["a mask"] * (call.mask is not None) + ["rotary"] * (call.rotation is not None)
    if call.site.mask.window and call.mask is None:
        inside.append(f"window {call.site.mask.window}")
    return f" with {', '.join(inside)}" if inside else ""


def _caches(writer: Writer, call: Call) -> tuple[fx.Node | None, fx.Node | None]:
    if call.rotation is None:
        return None, None
    dtype = call.out.meta["val"].dtype
    tables = zip(("cos", "sin"), (call.rotation.cos, call.rotation.sin), strict=True)
    cos, sin = (writer.constant(f"{name}_cache", table.to(dtype)) for name, table in tables)
    return cos, sin


def _standard(writer: Writer, subject: Subject, call: Call, views: Views) -> tuple[str, fx.Node]:
    site = call.site
    q, k, v = _turned(writer, subject, call, views)
    mask = call.mask
    if mask is not None:  # the kernel takes a size of 1 along the queries for an error
        lengths = [n.meta["val"].shape[2] for n in (call.q, call.k)]
        mask = writer.call(aten.expand.default, mask, [*mask.meta["val"].shape[:2], *lengths])
    if call.bias is not None:
        mask = write_bias(writer, call.bias)
    attributes = {
        "is_causal": int(site.mask.kind != "bidirectional" and mask is None),
        "q_num_heads": site.heads,
        "kv_num_heads": site.kv_heads,
        "scale": float(site.scale or 0.0),
    }
    if site.soft_cap:
        attributes["softcap"] = float(site.soft_cap)
    B, _, N, _ = call.out.meta["val"].shape
    y = writer.shaped(
        "Attention", [q, k, v, mask], attributes, (B, N, site.heads * call.widths[1]), fake_dtype(call.out)
    )
    return "Attention" + (_biased(call) or _told(call)), y


def _turned(writer: Writer, subject: Subject, call: Call, views: Views) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Queries, keys and values with tokens first, turned by nodes of their own."""
    q, k, v = (tokens_first(writer, views, node) for node in (call.q, call.k, call.v))
    if call.rotation is None:
        return q, k, v
    cos, sin = _caches(writer, call)
    at = positions(writer, subject, call.out)
    width = 0 if call.rotation.width == call.widths[0] else call.rotation.width
    attributes = {"interleaved": int(call.rotation.interleaved), "rotary_embedding_dim": width}
    q, k = (
        writer.onnx("RotaryEmbedding", [x, cos, sin, at], {**attributes, "num_heads": heads}, x)
        for x, heads in ((q, call.site.heads), (k, call.site.kv_heads))
    )
    return q, k, v


def fake_dtype(node: fx.Node) -> torch.dtype:
    """The dtype of a value."""
    held = fake(node)
    assert held is not None
    return held.dtype
