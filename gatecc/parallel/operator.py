"""``gatecc::moe_ffn`` whose experts lie on several ranks: what it does where they are DTensors.

A rewritten graph calls the operator on the live parameters. Where these are sharded by expert, torch hands the call to
the rules below: tokens go to their experts' ranks, the operator runs on the rank's own experts, results come back. So
graphs, state dicts and optimisers stay as they are. The exchange is one operator for torch.compile, forward and
backward.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._guards import detect_fake_mode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from gatecc.errors import ArgumentError
from gatecc.ops import moe_ffn as _operator
from gatecc.ops.moe_ffn.arguments import DIFFERENTIABLE, read
from gatecc.parallel.dispatch import Dispatcher, Route, Setting, dispatcher_of

assert _operator  # it must be there before its rules
SETTINGS: dict[DeviceMesh, Setting] = {}  # parameters of experts are on one of these meshes
TENSORS = 7  # of the operator; from the fourth on they are of experts
_ROUTED = 3

LIBRARY = torch.library.Library("gatecc", "FRAGMENT")
_EXPERTS = "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"
_GIVEN = f"Tensor x, Tensor weights, Tensor indices, {_EXPERTS}"
_OPTIONS = "str group, str dispatcher, str activation, str layout, str combine"
LIBRARY.define(f"moe_ffn_spread({_GIVEN}, *, {_OPTIONS}) -> Tensor")
LIBRARY.define(f"moe_ffn_spread_training({_GIVEN}, *, {_OPTIONS}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"moe_ffn_spread_backward(Tensor grad, Tensor kept, {_GIVEN}, *, bool[] needs, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_ops = torch.ops.gatecc


# --- on one rank's tensors --------------------------------------------------------------------------------------------


def _where(indices: Tensor, experts: int, group: dist.ProcessGroup) -> Tensor:
    """The rank of each slot's expert, (T, k); the size of the group for an empty slot."""
    return torch.div(indices, experts, rounding_mode="floor").clamp_(max=group.size())


def _own(indices: Tensor, experts: int, group: dist.ProcessGroup) -> Tensor:
    """Indices as this rank counts its experts; what is not its own is empty."""
    mine = indices - group.rank() * experts
    return torch.where((mine >= 0) & (mine < experts), mine, experts)


def _sent(route: Route, given: Sequence[Tensor], experts: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Tokens, weights and indices that this rank gets."""
    x, weights, indices = (route.send(t) for t in given)
    return [x, weights, _own(indices, experts, group)]


def _settings(group: str, dispatcher: str) -> tuple[dist.ProcessGroup, Dispatcher]:
    return _resolve_process_group(cast("Any", group)), dispatcher_of(dispatcher)


def _forward(*tensors: Tensor, group: str, dispatcher: str, **options: Any) -> Tensor:
    ranks, by = _settings(group, dispatcher)
    experts = tensors[_ROUTED].size(0)
    route = by.route(_where(tensors[2], experts, ranks), ranks)
    return route.gather(_ops.moe_ffn(*_sent(route, tensors[:3], experts, ranks), *tensors[_ROUTED:], **options))


def _training(*tensors: Tensor, group: str, dispatcher: str, **options: Any) -> tuple[Tensor, Tensor]:
    """The result, and what the gradient wants: all that was received, so that only gradients travel back."""
    ranks, by = _settings(group, dispatcher)
    experts = tensors[_ROUTED].size(0)
    route = by.route(_where(tensors[2], experts, ranks), ranks)
    received = _sent(route, tensors[:3], experts, ranks)
    out, hidden = _ops.moe_ffn_training(*received, *tensors[_ROUTED:], **options)
    return route.gather(out), _packed([route.kept().to(hidden.device), received[2], received[1], received[0], hidden])


def _backward(
    grad: Tensor, kept: Tensor, *tensors: Tensor, needs: list[bool], group: str, dispatcher: str, **options: Any
) -> tuple[Tensor, ...]:
    ranks, by = _settings(group, dispatcher)
    given, bank = tensors[:_ROUTED], tensors[_ROUTED:]
    owners = _where(given[2], bank[0].size(0), ranks)
    n = ranks.size() if by.rows(1, ranks.size()) is None else 0
    k, x, weights = given[2].size(1), given[0], given[1]
    rows = (kept.numel() - 8 * n) // _row_bytes(given, bank[0])
    shapes = ((n,), torch.int64), ((rows, k), torch.int64), ((rows, k), weights.dtype)
    shapes = (*shapes, ((rows, x.size(1)), x.dtype), ((rows * k, bank[0].size(1)), x.dtype))
    again, own, of_slots, got, hidden = _unpacked(kept, shapes)
    route = by.again(owners, ranks, again)
    grads = _ops.moe_ffn_backward(route.send(grad), hidden, got, of_slots, own, *bank, needs=needs, **options)
    back = [route.gather(g) if need else g for g, need in zip(grads[:2], needs[:2], strict=True)]
    return (*back, *grads[2:])


def _row_bytes(given: Sequence[Tensor], gate_up: Tensor) -> int:
    """Of what is kept of each row that a rank gets."""
    x, weights, indices = given
    k = indices.size(1)
    return k * (8 + weights.element_size()) + (x.size(1) + k * gate_up.size(1)) * x.element_size()


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one, in bytes, the widest elements first: an operator keeps one tensor for its gradient."""
    return torch.cat([t.contiguous().view(-1).view(torch.uint8) for t in tensors])


def _unpacked(packed: Tensor, shapes: Sequence[tuple[Any, torch.dtype]]) -> list[Tensor]:
    found: list[Tensor] = []
    start = 0
    for shape, dtype in shapes:
        size = torch.Size(shape).numel() * dtype.itemsize
        found.append(packed.narrow(0, start, size).view(dtype).view(shape))
        start += size
    return found


# --- while torch.compile traces ---------------------------------------------------------------------------------------


def _fake(*tensors: Tensor, group: str, dispatcher: str, **options: Any) -> Tensor:
    del group, dispatcher
    a = read(tensors, options)
    return a.x.new_empty(a.output_shape)


def _fake_training(*tensors: Tensor, group: str, dispatcher: str, **options: Any) -> tuple[Tensor, Tensor]:
    ranks, by = _settings(group, dispatcher)
    x = tensors[0]
    rows: Any = by.rows(x.size(0), ranks.size())
    size = torch.library.get_ctx().new_dynamic_size() if rows is None else rows * _row_bytes(tensors[:3], tensors[3])
    return _fake(*tensors, group=group, dispatcher=dispatcher, **options), x.new_empty(size, dtype=torch.uint8)


def _fake_backward(grad: Tensor, kept: Tensor, *tensors: Tensor, needs: list[bool], **_: Any) -> tuple[Tensor, ...]:
    del kept
    return tuple(
        tensors[i].new_empty(tensors[i].shape) if need else grad.new_empty(0)
        for i, need in zip(DIFFERENTIABLE, needs, strict=True)
    )


LIBRARY.impl("moe_ffn_spread", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("moe_ffn_spread_training", _training, "CompositeExplicitAutograd")
LIBRARY.impl("moe_ffn_spread_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::moe_ffn_spread", _fake, lib=LIBRARY)
torch.library.register_fake("gatecc::moe_ffn_spread_training", _fake_training, lib=LIBRARY)
torch.library.register_fake("gatecc::moe_ffn_spread_backward", _fake_backward, lib=LIBRARY)


# --- on DTensors ------------------------------------------------------------------------------------------------------


def _call(tensors: Sequence[Any], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any], int]:
    """The operator's tensors with the rank's own experts, its options with group and dispatcher, and the axis of the
    mesh that experts lie along."""
    full = [*tensors, *[None] * (TENSORS - len(tensors))]
    bank = full[_ROUTED]
    if any(isinstance(t, DTensor) for t in full[:_ROUTED]):
        raise ArgumentError(
            "tokens and routing weights of moe_ffn are plain tensors, each rank's own",
            found="a DTensor",
            do="x.to_local() before the layer",
        )
    others = [t for t in full[_ROUTED:] if t is not None]
    if not isinstance(bank, DTensor) or any(
        not isinstance(t, DTensor) or t.placements != bank.placements or t.device_mesh != bank.device_mesh
        for t in others
    ):
        raise ArgumentError(
            "the weights of experts are placed differently",
            found=", ".join(str(getattr(t, "placements", "a plain tensor")) for t in others),
            expected="the same for all",
            do="gatecc.parallel.expert_parallel places all of a layer",
        )
    axes = [i for i, p in enumerate(bank.placements) if not p.is_replicate()]
    if [bank.placements[i] for i in axes] != [Shard(0)]:
        raise ArgumentError(
            "experts are sharded in a way that moe_ffn does not know", found=str(bank.placements), expected="Shard(0)"
        )
    mesh = bank.device_mesh
    group = mesh.get_group(axes[0]).group_name
    setting = SETTINGS.get(mesh, Setting())
    defaults = {"activation": "silu", "layout": "halves", "combine": "sum"}
    local = [t.to_local() if isinstance(t, DTensor) else t for t in full]
    return local, {**defaults, **options, "group": group, "dispatcher": setting.dispatcher}, axes[0]


@contextmanager
def _sizes_inside(tensors: Sequence[Any]) -> Generator[None]:
    """While Dynamo looks at shapes alone, how much a rank receives is a size that it cannot find in any result: what
    the operator keeps for its gradient, autograd holds."""
    mode = detect_fake_mode(tensors)
    if mode is None or mode.shape_env is None or get_proxy_mode() is not None:
        yield
        return
    with mode.shape_env.ignore_fresh_unbacked_symbols():
        yield


def _rule(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    del cls, types
    tensors, options, _ = _call(args, kwargs or {})
    spread = {_ops.moe_ffn.default: _ops.moe_ffn_spread, _ops.moe_ffn_training.default: _ops.moe_ffn_spread_training}
    with _sizes_inside(tensors):
        return spread[func](*tensors, **options)


def _rule_of_gradient(cls: Any, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    del cls, func, types
    tensors, options, axis = _call(args[2:], dict(kwargs))
    grads = list(_ops.moe_ffn_spread_backward(*args[:2], *tensors, **options))
    for number, place in enumerate(DIFFERENTIABLE):
        whole = args[2 + place] if 2 + place < len(args) else None
        if place >= _ROUTED and isinstance(whole, DTensor) and options["needs"][number]:
            grads[number] = _averaged(grads[number], whole, axis)
    return tuple(grads)


def _averaged(grad: Tensor, whole: DTensor, axis: int) -> DTensor:
    """The gradient of a rank's experts, which is a sum over the tokens of all ranks, as data parallelism has it.

    DDP and FSDP average over ranks, so it is divided by the ranks whose tokens it holds; along the other axes of the
    mesh, where the same experts lie again, it is averaged here.
    """
    mesh, setting = whole.device_mesh, SETTINGS.get(whole.device_mesh, Setting())
    copies = [i for i in range(mesh.ndim) if i != axis]
    ranks = 1 if dispatcher_of(setting.dispatcher).replicated else mesh.size(axis)
    for i in copies:
        grad = torch.ops._c10d_functional.all_reduce(grad, "sum", mesh.get_group(i).group_name)
        grad = torch.ops._c10d_functional.wait_tensor(grad)
        ranks *= mesh.size(i)
    if setting.mean and ranks > 1:
        grad = grad / ranks
    return DTensor.from_local(
        grad, mesh, whole.placements, run_check=False, shape=whole.shape, stride=_contiguous(whole.shape)
    )


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


torch.library.register_torch_dispatch("gatecc::moe_ffn", DTensor, _rule, lib=LIBRARY)
torch.library.register_torch_dispatch("gatecc::moe_ffn_training", DTensor, _rule, lib=LIBRARY)
torch.library.register_torch_dispatch("gatecc::moe_ffn_backward", DTensor, _rule_of_gradient, lib=LIBRARY)
