"""Routing: what routers did in the steps of a training, and what has to happen between two of them.

A router keeps its figures and the values of its losses in buffers: those of a step are readable from its first forward
pass until the first of the next step. `step` says where a step ends, after ``optimizer.step()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule
from gatecc.ir.router import Router
from gatecc.passes.reweight.groups import GroupMask

_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")  # of DDP, torch.compile, FSDP
_LOSS = "loss_"
_STEP = "routed_step"  # of what keeps figures of a step, routers or not


@dataclass(frozen=True)
class Routing:
    """What a router did since the last step.

    ``load`` (E,): each expert's share of the slots that ran; ``importance`` (E,): its share of their weights;
    ``entropy``: the mean entropy of the probabilities by log(E), 1 where all experts are equally likely; ``dropped``:
    the share of chosen slots that a capacity left out; ``tokens`` and ``passes``: how many there were.
    """

    load: Tensor
    importance: Tensor
    entropy: float
    dropped: float
    tokens: int
    passes: int

    @property
    def imbalance(self) -> float:
        """The load of the busiest expert relative to an even share: 1 is balanced, E the collapse."""
        return float(self.load.max()) * self.load.numel()

    @property
    def unused(self) -> int:
        """How many experts had no token."""
        return int((self.load == 0).sum())


def aux_losses(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The balancing losses of a model's routers: their weights included, a mean over the forward passes of this step.

    ``{"model.layers.0.mlp.router": {"aux": 0.01, "z": 0.002}}``, detached numbers. They must not be added to the loss:
    their gradients enter in the backward pass, as if ``loss_scale · value`` of each had been added; `scale_losses` sets
    the scale. Reads a transformed model, one inside DDP, FSDP or torch.compile, and the module of an ExportedProgram
    that was exported in training mode.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for path, state in model.named_buffers():
        owner, _, name = path.rpartition(".")
        if name.startswith(_LOSS) and state.shape == (3,):
            found.setdefault(_plain(owner), {})[name.removeprefix(_LOSS)] = state[2] / state[1].clamp_min(1.0)
    return found


def scale_losses(model: nn.Module, scale: float) -> None:
    """What the gradients of balancing losses are multiplied by, from the next forward pass on; 1 at first.

    It has to be what the task's loss is multiplied by before ``backward()``: 1/n for the mean over n accumulated
    batches, times ``scaler.get_scale()`` with a GradScaler. Under DDP and FSDP, which average gradients, it stays: each
    process balances its own tokens. `heal`, `trainer_callback` and `lightning_callback` set it by themselves.

    Raises ArgumentError if no router of the model adds a loss.
    """
    scales = [b for path, b in model.named_buffers() if path.rpartition(".")[2] == "loss_scale"]
    if not scales:
        raise ArgumentError(
            "no router of this model adds a loss", expected='RouterSpec(..., balance="aux"), or another that is a loss'
        )
    for buffer in scales:
        buffer.fill_(scale)


def routing(model: nn.Module) -> dict[str, Routing]:
    """What each router of a model did in training since the last step, by its name: load, importance, entropy, drops.

    Only passes in training mode are counted; an evaluation costs nothing and changes no figure.
    """
    return {name: _routing(router) for name, router in routers(model)}


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """The routers of a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Router):
            yield _plain(name), module


def _routing(router: Router) -> Routing:
    experts = router.experts
    _, passes, tokens, entropy, dropped, *_ = router.get_buffer("routed").tolist()
    load, importance = router.get_buffer("routed")[-2 * experts :].clone().split(experts)
    ran = float(load.sum())
    most = float(torch.tensor(float(experts)).log()) if experts > 1 else 1.0
    return Routing(
        load / max(ran, 1.0),
        importance / importance.sum().clamp_min(1e-20),
        entropy / max(tokens, 1.0) / most,
        dropped / max(ran + dropped, 1.0),
        int(tokens),
        int(passes),
    )


@torch.no_grad()
def step(model: nn.Module) -> None:
    """Say that a step of the optimizer has ended. To be called once after each ``optimizer.step()``.

    Temperatures, thresholds and capacities go on along their schedules, Sinkhorn steps alternate, biases of loss-free
    balancing move by the loads of this step, all passes of its accumulation and all processes of torch.distributed
    together, and figures start anew with the next forward pass. Masks of groups are pruned and regrown when it is time.
    It does nothing in a model without routers or such masks.
    """
    for module in model.modules():
        if isinstance(module, GroupMask):
            module.advance()
    found = [router for _, router in routers(model)]
    counts = [router.counts.clone() for router in found]
    if counts and any(r.router.balances_by_bias for r in found) and dist.is_available() and dist.is_initialized():
        flat = torch.cat(counts)
        dist.all_reduce(flat)
        counts = list(flat.split([c.numel() for c in counts]))
    for router, count in zip(found, counts, strict=True):
        router.advance(count)
    for module in model.modules():
        if not isinstance(module, Router) and (own := dict(module.named_buffers(recurse=False)).get(_STEP)) is not None:
            own.add_(1)


def statistics(model: nn.Module, *, per_layer: bool = False) -> dict[str, float]:
    """Numbers for a log: of routers entropy, imbalance, unused, dropped, losses; of gates open, weight, gradient.

    Means over the layers, the largest imbalance, sums of losses and unused experts; ``per_layer`` adds each layer's. A
    gate is ``open`` by its mean value where what it reads contributes nothing: at its bias.
    """
    rows = {name: _router_row(found) for name, found in routing(model).items()}
    losses = aux_losses(model)
    for name, row in rows.items():
        row.update({f"loss_{tag}": float(value) for tag, value in losses.get(name, {}).items()})
    gates = {_plain(name): _gate_row(m) for name, m in model.named_modules() if _is_gate(m)}
    out = {**_summary("routing", rows), **_summary("gates", gates)}
    if per_layer:
        for kind, table in (("routing", rows), ("gates", gates)):
            out.update({f"{kind}/{name}/{key}": v for name, row in table.items() for key, v in row.items()})
    return out


def _router_row(found: Routing) -> dict[str, float]:
    return {
        "entropy": found.entropy,
        "imbalance": found.imbalance,
        "unused": float(found.unused),
        "dropped": found.dropped,
    }


def _is_gate(module: nn.Module) -> bool:
    return isinstance(module, GateModule) and not isinstance(module, Router)


@torch.no_grad()
def _gate_row(module: nn.Module) -> dict[str, float]:
    assert isinstance(module, GateModule)
    params = dict(module.named_parameters(recurse=False))
    constant = params.get(module.spec.scorer.constant)
    at = torch.zeros(module.width) if constant is None else constant.detach().float().reshape(-1, module.width)
    row = {"open": float(module.spec.estimator.decide(at, module.activation).mean())}
    if "weight" in params:
        weight = params["weight"]
        row["weight"] = float(weight.detach().float().norm())
        row["gradient"] = 0.0 if weight.grad is None else float(weight.grad.float().norm())
    return row


def _summary(kind: str, rows: dict[str, dict[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    out: dict[str, float] = {}
    for key in keys:
        values = [row[key] for row in rows.values() if key in row]
        total = key == "unused" or key.startswith(_LOSS)
        out[f"{kind}/{key}"] = max(values) if key == "imbalance" else sum(values) / (1 if total else len(values))
    return out


def _plain(path: str) -> str:
    """A name without those of wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)
