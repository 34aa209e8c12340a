"""Launches the kernels of short convolutions."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gatecc.codegen.triton.configs import config, width
from gatecc.codegen.triton.sizes import cdiv
from gatecc.ops.short_convolution.arguments import Arguments
from gatecc.ops.short_convolution.kernels import Gradients
from gatecc.ops.short_convolution.triton.kernels.taps import convolve, differentiate, spread

Kernel = Literal["convolve", "differentiate", "spread"]


class Tile(NamedTuple):
    """A tensor (B, N, C) as kernels see it, its channels side by side."""

    at: Tensor
    sample: int
    token: int


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """y and the last inputs."""
    x = _side_by_side(a.x)
    y, after = x.new_empty(x.shape), x.new_empty(a.state_shape)
    kept = _power(a.taps - 1)
    given = (_seen(x), a.weight.contiguous(), _whole(a.bias), _seen(a.state), _seen(y), _seen(after))
    _start("convolve", convolve, a, x.size(1), *given, SILU=a.activation == "silu", KEPT=kept)
    return y, after


def backward(a: Arguments, grad: Tensor, needs: list[bool]) -> Gradients:
    """Gradients of (x, weight, bias, state), None where none is needed. Sums are added in one order."""
    x, grad = _side_by_side(a.x), _side_by_side(grad)
    (B, N, C), K, silu = x.shape, a.taps, a.activation == "silu"
    learns, moves = needs[1] or needs[2], needs[0] or needs[3]
    dz = x.new_empty(x.shape) if silu and moves else grad
    dx, dweight, dbias, dstate = (
        t.new_empty(t.shape) if need and t is not None else None for t, need in zip(a.tensors, needs, strict=True)
    )
    weight = a.weight.contiguous()
    if learns or silu:
        block = _blocks("differentiate", a, N)
        sums = x.new_empty(B * cdiv(N, block["tokens"]), K + 1, C, dtype=torch.float32) if learns else None
        given = (_seen(x), weight, _whole(a.bias), _seen(a.state), _seen(grad), _seen(dz) if dz is not grad else None)
        _start("differentiate", differentiate, a, N, *given, sums, SILU=silu)
        if sums is not None:
            total = sums.sum(0)
            dweight = total[:K].T.unsqueeze(1).to(x.dtype).contiguous() if dweight is not None else None
            dbias = total[K].to(x.dtype) if dbias is not None else None
    if moves:
        first = 0 if dstate is None else 1 - K
        _start("spread", spread, a, N - first, _seen(dz), weight, _seen(dx), _seen(dstate), first=first)
    return dx, dweight, dbias, dstate


def _start(name: Kernel, kernel: Any, a: Arguments, tokens: int, *given: Any, **constants: Any) -> None:
    """Launch a kernel over so many tokens."""
    B, N, C = a.x.shape
    block = _blocks(name, a, tokens)
    blocks = cdiv(tokens, block["tokens"])
    sizes = {"N": N, "C": C, "K": a.taps, "TOKENS": block["tokens"], "CHANNELS": block["channels"]}
    with torch.cuda.device_of(a.x):
        kernel[(B * blocks, cdiv(C, block["channels"]))](
            *given, blocks=blocks, **sizes, **constants, num_warps=block["warps"], num_stages=1
        )


def _blocks(name: Kernel, a: Arguments, tokens: int) -> dict[str, int]:
    """The tile of a program, and what runs it: fewer warps for fewer tokens."""
    most = config(__package__ or "", "step" if tokens == 1 else name, width(a.x.dtype))
    rows = min(most["tokens"], _power(tokens))
    warps = max(1, most["warps"] * rows // most["tokens"])
    return {"tokens": rows, "channels": min(most["channels"], _power(a.x.size(2))), "warps": warps}


def _power(number: int) -> int:
    """The power of two that covers a number."""
    return 1 << (number - 1).bit_length()


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _seen(x: Tensor | None) -> Tile | None:
    if x is None:
        return None
    x = _side_by_side(x)
    return Tile(x, x.stride(0), x.stride(1))


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
