"""What may be given to ``gatecc::gated_conv``, and the sizes that follow from it."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatecc.errors import ArgumentError

OPTIONS = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")


class Arguments(NamedTuple):
    """The arguments of one call, checked. x: (B, Cin, *space), weight as the convolution has it, gate: (B or 1, Cout,
    1, ...), bias: (Cout,), inputs: (B or 1, Cin, 1, ...)."""

    x: Tensor
    weight: Tensor
    gate: Tensor
    bias: Tensor | None
    inputs: Tensor | None
    options: dict[str, Any]

    @property
    def rows(self) -> int:
        """The axis of the kernel that counts output channels; the other of the first two counts inputs."""
        return int(self.options["transposed"])

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads one input channel."""
        return self.options["groups"] > 1

    @property
    def pairs(self) -> int:
        """How many pairs of an output channel and an input channel that it reads there are."""
        return self.weight.size(0) * self.weight.size(1)

    @property
    def places(self) -> int:
        """Multiplications of one pair in one sample."""
        space = self.x.shape[2:] if self.options["transposed"] else self.space
        return prod(space) * prod(self.weight.shape[2:])

    @property
    def space(self) -> list[int]:
        """The sizes of the result behind its channels."""
        o, made = self.options, list[int]()
        for i, (size, taps) in enumerate(zip(self.x.shape[2:], self.weight.shape[2:], strict=True)):
            reach, around = o["dilation"][i] * (taps - 1), 2 * o["padding"][i]
            if o["transposed"]:
                made.append((size - 1) * o["stride"][i] - around + reach + o["output_padding"][i] + 1)
            else:
                made.append((size + around - reach - 1) // o["stride"][i] + 1)
        return made


def read(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None, inputs: Tensor | None, options: dict[str, Any]
) -> Arguments:
    """The arguments of a call. Raises ArgumentError for shapes that do not fit."""
    found = Arguments(x, weight, gate, bias, inputs, options)
    groups, shared = options["groups"], weight.size(1 - found.rows)
    if groups > 1 and (found.rows or shared > 1):
        raise ArgumentError(
            "the channels of this convolution cannot be left out one by one",
            found=f"{groups} groups of {shared} input channels" + (", transposed" if found.rows else ""),
            expected="one group, or a depthwise convolution: groups have to stay equally large",
            do="multiply its result by the gate",
        )
    channels = weight.size(found.rows)
    for name, mask, width in (("gate", gate, channels), ("inputs", inputs, x.size(1))):
        if mask is not None and (mask.dim() != x.dim() or mask.shape[1:] != (width, *[1] * (x.dim() - 2))):
            raise ArgumentError(
                f"{name} is a number per sample and channel",
                found=f"{tuple(mask.shape)} for x {tuple(x.shape)}",
                expected=f"(B, {width}{', 1' * (x.dim() - 2)}), or one row for all samples",
            )
    return found


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The convolution with all channels of what it is given."""
    return torch.ops.aten.convolution.default(x, weight, bias, *(options[name] for name in OPTIONS))


def masked(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None, inputs: Tensor | None = None, **options: Any
) -> Tensor:
    """All channels, times the gate: the function that the operator is. x shows by itself what ``inputs`` says."""
    y = convolve(x, weight, bias, options)
    return y * gate.to(y.dtype)
