"""Record: run a model once and keep the real calls of chosen submodules, with what they returned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from gatecc.capture.adapters import adapted
from gatecc.capture.shield import callers_device
from gatecc.capture.signature import OpaqueArgumentError, copied, map_tensors


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call of a submodule. Tensors are copies, taken before the module could change them in place."""

    fqn: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def record_calls(
    model: nn.Module, fqns: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, list[RecordedCall]], Any]:
    """Run ``model(*args, **kwargs)`` without gradients and return the calls of ``fqns``, and the model's output.

    The model gets copies of the tensors, for it may change them in place. Calls that hold something other than tensors
    and constants are kept as they are, uncopied.
    """
    calls: dict[str, list[RecordedCall]] = {fqn: [] for fqn in fqns}
    handles = [
        module.register_forward_pre_hook(_hook(calls[fqn], fqn), with_kwargs=True)
        for fqn, module in model.named_modules()
        if fqn in calls
    ]
    try:
        with torch.no_grad(), adapted(model), callers_device(), of_shapes(model, (args, kwargs)) as (args, kwargs):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


@contextmanager
def of_shapes(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> Generator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A call with copies of its tensors; of a model on the meta device, fake ones while the context is open.

    Models know fake tensors as those of a tracer, and take no decisions on values that are not there.
    """
    if not any(p.is_meta for p in model.parameters()):
        yield copied(call)
        return
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield map_tensors(lambda x: mode.from_tensor(x, static_shapes=True), call)


def _hook(calls: list[RecordedCall], fqn: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(RecordedCall(fqn, *_copied(args, kwargs)))

    return hook


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        return map_tensors(_copy, (args, kwargs))
    except OpaqueArgumentError:
        return args, kwargs


def _copy(x: torch.Tensor) -> torch.Tensor:
    if not isinstance(x, FakeTensor):
        return x.detach().clone()
    with unset_fake_temporarily():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
