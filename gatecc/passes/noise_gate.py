"""NoiseGate: values that give way to noise with the statistics of their sample, at the price of information."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatecc import ops as ops  # registers gatecc::add_loss
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site
from gatecc.passes.gating import gate_node, read_by, reads_afar
from gatecc.passes.operands import place, readers, stage

_LEAST = 1e-6  # of 1 - λ and of σ: the loss stays finite


class Noise(nn.Module):
    """λ h + (1 - λ) (μ + σ ε), ε ~ N(0, 1), with μ and σ of h over the nodes of a sample, which have no gradient.

    In training the loss enters in the backward pass, times ``beta`` and the buffer ``loss_scale``; without noise in
    eval.
    """

    loss_scale: Tensor
    loss_kl: Tensor
    step: Tensor

    def __init__(self, over: tuple[int, ...], beta: float) -> None:
        super().__init__()
        self.over, self.beta = over, beta
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)
        self.register_buffer("loss_kl", torch.zeros(3), persistent=False)
        self.register_buffer("step", torch.zeros(()), persistent=False)

    def forward(self, h: Tensor, gate: Tensor) -> Tensor:
        """h: (B, N, C) or another value with nodes, gate: broadcast to it -> like h"""
        mean = h.detach().mean(self.over, keepdim=True)
        if not self.training:
            return torch.lerp(mean, h, gate)
        std = h.detach().var(self.over, keepdim=True, correction=0).sqrt()
        y = torch.lerp(mean + std * torch.randn_like(h), h, gate)
        loss = self.beta * information(h, gate, mean, std)
        torch.ops.gatecc.record(self.loss_kl, torch.stack((torch.ones_like(loss), loss)).detach(), self.step)
        return torch.ops.gatecc.add_loss(y, loss, self.loss_scale)


def information(h: Tensor, gate: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The mean over nodes and channels of KL(N(λ h + (1 - λ) μ, (1 - λ)² σ²) ‖ N(μ, σ²)): what the gated value still
    says of h, in nats. ()

    ½ ((1 - λ)² + (λ (h - μ) / σ)² - 1) - log(1 - λ). The authors' code leaves the logarithm out.
    """
    rest = (1 - gate).clamp_min(_LEAST)
    shift = gate * (h - mean) / std.clamp_min(_LEAST)
    return (0.5 * (rest.square() + shift.square() - 1) - rest.log()).mean()


@dataclass(frozen=True)
class NoiseGate(Rewrite):
    """Blend a value with noise: ``y <- g * y + (1 - g) * (mean + std * noise)``, mean and standard deviation over the
    nodes (tokens, pixels) of a sample, in each channel.

    ``beta`` weighs the information that is left of the value (`information`), a loss that enters in the backward pass;
    ``gatecc.aux_losses`` reads it. In eval there is no noise. The gate is to be between 0 and 1: a sigmoid, with
    ``estimator="gumbel"`` sampled in training. ``label`` names the gate's module on the owner.
    """

    name = "noise_gate"

    gate: GateSpec
    beta: float = 1.0
    label: str = "gate"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ArgumentError("information has a price, or none", found=f"beta={self.beta}", expected="beta >= 0")

    def contract(self) -> Contract:
        return self.gate.contract()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True, whole_model=reads_afar(self.gate))

    def reads(self) -> Iterable[str]:
        return (self.site.stage, *read_by(self.gate))

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = stage(site, self.site.stage)
        positions = value.axes.positions
        over = tuple(i for i, axis in enumerate(value.axes) if axis in positions and axis != "b")
        if "b" not in positions or not over:
            raise SiteRefusedError(
                "a value has no nodes whose statistics the noise could have",
                where=place(site),
                found=f"axes {value.axes}",
                expected="samples and tokens, or pixels: (b, n, c), (b, c, y, x)",
                do="gate a value before it is pooled; of packed graphs, one graph per sample",
            )
        gate, _ = gate_node(self.gate, self.site, value, edit, self.label)
        path = edit.module("noise", lambda: Noise(over, self.beta))
        edit.replace(value.node, edit.call(path, value.node, gate, name="with_noise"), readers(site, self.site.stage))
