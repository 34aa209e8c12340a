"""Traced: a scope that is called under someone else's torch.export or make_fx, with a kind of call not seen before.

The capture is made on real tensors of the same sizes, behind the shield, where the tracer's modes do not reach. The
tracer has put fake tensors in the place of the scope's weights; the real ones come back for the time of the capture,
because sharing between layers is proved with them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.compiler import set_stance
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode

from gatecc.capture.shield import apart, random_states_kept
from gatecc.capture.signature import map_tensors
from gatecc.errors import CaptureError

T = TypeVar("T")


def is_traced(leaves: Sequence[torch.Tensor]) -> bool:
    """Whether a call with these tensors is being traced."""
    return any(isinstance(x, FakeTensor) for x in leaves) or get_proxy_mode() is not None


def outside(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    work: Callable[[tuple[Any, ...], dict[str, Any]], T],
) -> T:
    """``work(args, kwargs)`` on real stand-ins of traced arguments, behind the shield. Raises what work raises."""

    def run() -> T:
        generator = torch.Generator().manual_seed(0)
        real_args, real_kwargs = cast("tuple[Any, Any]", map_tensors(lambda x: _real(x, generator), (args, kwargs)))
        with set_stance("force_eager"), random_states_kept():  # Dynamo may wait for us, with its lock held
            return work(real_args, real_kwargs)

    with disable_proxy_modes_tracing(), unset_fake_temporarily(), _export_globals(), _real_weights(module):
        return apart(run)


def _real(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise for floats (on zeros most layers are alike), True for booleans (no mask hides all), 0 for indices."""
    sizes = [s if type(s) is int else cast("int", cast("torch.SymInt", s).node.hint) for s in x.shape]
    if x.is_floating_point():
        return torch.randn(sizes, generator=generator).to(x.dtype).to(x.device)
    return torch.full(sizes, x.dtype == torch.bool, dtype=x.dtype, device=x.device)


@contextmanager
def _real_weights(module: nn.Module) -> Generator[None]:
    swapped: list[tuple[dict[str, Any], str, FakeTensor]] = []
    try:
        for m in module.modules():
            for table in cast("tuple[dict[str, Any], ...]", (m._parameters, m._buffers)):
                for name, tensor in list(table.items()):
                    if isinstance(tensor, FakeTensor):
                        table[name] = _behind(tensor)
                        swapped.append((table, name, tensor))
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


def _behind(fake: FakeTensor) -> torch.Tensor:
    """The tensor that a fake one was made from: the converter remembers it as long as it lives."""
    converter = fake.fake_mode.fake_tensor_converter.meta_converter
    for real, number in converter.describer.lookup_tensor.items():
        if converter.tensor_memo.get(number) is fake:
            return cast("torch.Tensor", real)
    raise CaptureError(
        "a module is traced with weights that are not its own", found="fake tensors that were made from nothing real"
    )


@contextmanager
def _export_globals() -> Generator[None]:
    """torch.export keeps its running state in module globals, which an inner export would clear."""
    from torch.export import _trace

    kept = {name: value for name, value in vars(_trace).items() if name.startswith("_EXPORT_")}
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(_trace, name, value)
