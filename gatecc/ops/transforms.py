"""Operators under torch.func (grad, vmap, jvp) and forward-mode differentiation.

An operator with kernels of its own is opaque to these. What they need is the same function in ATen, which has every
derivative and every batching rule; it runs in the operator's place, and only there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch._library.autograd import make_autograd_impl
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad

from gatecc.errors import ArgumentError

LIBRARY = torch.library.Library("gatecc", "FRAGMENT")
UNDER_FUNC = "FuncTorchDynamicLayerFrontMode"  # the key of a call while a transform of torch.func runs
_AUTOCASTS = ("AutocastCPU", "AutocastCUDA")
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
Tensors = tuple[Tensor | None, ...]


def has_tangents(tensors: Iterable[Any]) -> bool:
    """Whether forward-mode differentiation follows one of these."""
    # The level is a number: calls outside of forward-mode pay for one comparison.
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def reaches_kernel(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a call on these would come to its kernel with nothing to do on the way: they are plain tensors of which
    none is differentiated, and no mode and no transform looks on."""
    if forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return False
    learns = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) is not Tensor or (learns and x.requires_grad)):
            return False
    return not torch._C._are_functorch_transforms_active()


def derivatives(x: Tensor) -> float:
    """How many derivatives with respect to ``x`` may be taken, by torch.func and by autograd around it.

    Forward mode counts as endless.
    """
    kinds = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    while is_functorch_wrapped_tensor(x):  # which does not tell
        x = get_unwrapped(x)
    around = torch.is_grad_enabled() and x.requires_grad
    return float("inf") if TransformType.Jvp in kinds else kinds.count(TransformType.Grad) + around


def instead(operator: CustomOpDef, function: Callable[..., Any]) -> None:
    """Let ``function``, of the operator's arguments, run in the place of an operator under these transforms.

    To be called after the operator's own gradient was registered.
    """
    usual = make_autograd_impl(operator._opoverload, operator)

    def autograd(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if has_tangents(args):
            return function(*args, **kwargs)
        return usual(keys, *args, **kwargs)

    name = operator._qualname
    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True, allow_override=True)
    LIBRARY.impl(name, function, UNDER_FUNC)


def fake_gradients(like: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """What a fake kernel of gradients gives: the shape of each tensor that needs one, and nothing for the others."""
    return tuple(
        x.new_empty(x.shape) if need and x is not None else like.new_empty(0)
        for x, need in zip(tensors, needs, strict=True)
    )


def below_autograd(operator: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> Any:
    """An operator (an overload) as the keys behind autograd compute it."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *tensors, **options)


def learn(operator: Any, learned: type[torch.autograd.Function], in_aten: Callable[..., Any]) -> None:
    """Let ``learned`` run an operator (an overload) where a gradient is wanted, ``in_aten`` under forward mode.

    What torch.library.register_autograd does, without its search for tensors in nested arguments: that takes longer
    than short sequences do. ``learned`` takes the keys of the call, its options, and its tensors.
    """

    def autograd(keys: Any, *tensors: Any, **options: Any) -> Any:
        if has_tangents(tensors):
            return in_aten(*tensors, **options)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            return learned.apply(keys, options, *tensors)
        return below_autograd(operator, keys, options, *tensors)

    LIBRARY.impl(operator._opname, autograd, "Autograd", with_keyset=True)


def autocast(operator: Any, cast: Callable[[Tensors], Tensors], in_aten: Callable[..., Any]) -> None:
    """Let ``cast`` say what the tensors of an operator (an overload) are under autocast, inside a transform of
    torch.func too: that comes before autocast, and ``in_aten`` runs there."""

    def usual(*tensors: Tensor | None, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return operator(*cast(tensors), **options)

    def under_func(*tensors: Any, **options: Any) -> Any:
        device = tensors[0].device.type
        if not torch.is_autocast_enabled(device):
            return in_aten(*tensors, **options)
        with torch.autocast(device, enabled=False):
            return in_aten(*cast(tensors), **options)

    for key in _AUTOCASTS:
        LIBRARY.impl(operator._opname, usual, key)
    LIBRARY.impl(operator._opname, under_func, UNDER_FUNC)


def refuse(what: str, *, found: str, do: str) -> NoReturn:
    """Raise ArgumentError: the operator has no such derivative."""
    raise ArgumentError(what, found=found, expected="loss.backward() or torch.autograd.grad, once", do=do)
