"""What ATen operators do to elements: the families that matchers reason with, by operator name."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

# Elements stay as they are; only their places change (or some are dropped or repeated).
VIEWS = frozenset(
    "view reshape _unsafe_view view_as reshape_as permute transpose t numpy_T mT adjoint swapaxes swapdims movedim "
    "moveaxis unsqueeze squeeze expand expand_as contiguous clone alias detach lift_fresh_copy lift_fresh flatten "
    "unflatten slice select narrow split split_with_sizes chunk unbind tensor_split getitem repeat "
    "repeat_interleave tile "
    "broadcast_to unfold index_select index gather roll flip".split()
)
RESHAPES = frozenset("view reshape _unsafe_view view_as reshape_as flatten unflatten".split())
TRANSPOSES = frozenset("permute transpose t numpy_T mT adjoint swapaxes swapdims movedim moveaxis".split())
SAME_SHAPE = frozenset("contiguous clone alias detach lift_fresh_copy lift_fresh".split())
CASTS = frozenset("to _to_copy type_as float half bfloat16 double".split())
DROPOUTS = frozenset("dropout native_dropout feature_dropout alpha_dropout".split())

# Matrix products and their like: the output mixes elements, and is finite if the inputs are.
CONTRACTIONS = frozenset(
    "matmul bmm mm mv dot inner linear addmm addmv baddbmm addbmm einsum bilinear tensordot linalg_matmul "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "scaled_dot_product_attention _grouped_mm".split()
)
SOFTMAXES = frozenset("softmax _softmax _safe_softmax special_softmax".split())

# Finite in, finite out, and no decision is taken on the elements: safe for values that are not known.
_ARITHMETIC = frozenset(
    "add sub rsub mul neg tanh clamp clamp_min clamp_max clip maximum minimum max amax sigmoid cat stack pad "
    "constant_pad_nd relu gelu silu tril triu nan_to_num sum mean copy slice_scatter select_scatter index_put".split()
)
FINITE = VIEWS | CASTS | DROPOUTS | CONTRACTIONS | _ARITHMETIC

# Only the shape, dtype and device of the first argument matter.
SHAPE_ONLY = frozenset(
    "sym_size sym_numel sym_stride sym_storage_offset new_ones new_zeros new_full new_empty zeros_like ones_like "
    "full_like empty_like size".split()
)

# Tensors of their own, however the arguments are laid out.
_NEW = CONTRACTIONS | frozenset(
    "empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full "
    "empty zeros ones full clone grouped_mm_fallback".split()
)


def opname(node: fx.Node) -> str:
    """The operator's name without namespace, overload and the underscore of the in-place form: "add", "getitem".

    The empty string for nodes that call no operator.
    """
    target = node.target
    if isinstance(target, OpOverload):
        name = target._opname
        return name[:-1] if name.endswith("_") and not name.endswith("__") else name
    return "getitem" if target is operator.getitem else ""


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a canonical or raw call, given by position or by name."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def named(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator by the name in its schema; ``default`` if the schema has none of that name."""
    assert isinstance(node.target, OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[i] if i < len(node.args) else node.kwargs.get(name, argument.default_value)
    return default


def operands(node: fx.Node) -> list[Any]:
    """The positional arguments."""
    return list(node.args)


def mutates(node: fx.Node) -> bool:
    """Whether the operator writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def writes_for_others(node: fx.Node) -> bool:
    """Whether an operator writes to what others may read: anything but a new tensor that only it uses."""
    if not mutates(node):
        return False
    if [node.args[0]] != written(node):
        return True
    into, reader = node.args[0], node
    while isinstance(into, fx.Node) and set(into.users) == {reader}:
        if opname(into) in _NEW:
            return False
        if opname(into) not in VIEWS and not mutates(into):
            return True
        into, reader = into.args[0], into
    return True


def same_call(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes call one operator with the same arguments, one that neither writes nor draws."""
    target = one.target
    if target != other.target or not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and one.args == other.args and one.kwargs == other.kwargs


def written(node: fx.Node) -> list[fx.Node]:
    """The arguments that the operator writes to; ``out=`` is one."""
    if not mutates(node) or not isinstance(node.target, OpOverload):
        return []
    found = [
        argument(node, at, a.name)
        for at, a in enumerate(node.target._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]
    return [n for n in found if isinstance(n, fx.Node)]
