"""Mixture: what a layer that `Route` made computes, in the terms of the architectures of transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.handoff.unfit import UnfitError
from gatecc.ir.gates.choice import BIAS, Choice, SoftmaxTopK
from gatecc.ir.gates.choices.unweighted import Unweighted
from gatecc.ir.gates.scorer import Linear
from gatecc.ir.router import Router, RouterSpec
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.route import Route
from gatecc.passes.route.shared import SharedExpert


@dataclass(frozen=True)
class Mixture:
    """``router`` (E, d), ``gate_up`` (E, 2F, d) with the rows of the gate first, ``down`` (E, d, F); the k largest of
    softmax(router x) weigh the experts, divided by their sum with ``renorm``. ``shared``: gate (1, d), and the matrices
    of an expert that every token takes, scaled by sigma(gate x)."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    k: int
    renorm: bool
    shared: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def experts(self) -> int:
        return self.router.size(0)

    @property
    def hidden(self) -> int:
        return self.down.size(2)

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        """What layers of one architecture have in common."""
        return self.experts, self.hidden, self.k, self.renorm


def mixture(layer: nn.Module, route: Route) -> Mixture:
    """What a routed layer computes. Raises UnfitError."""
    experts, router = getattr(layer, route.label, None), getattr(layer, "router", None)
    if not isinstance(experts, Experts) or not isinstance(router, Router) or route.combine != "sum" or route.skip:
        raise UnfitError(f"experts whose results are not simply added: combine={route.combine!r}, skip={route.skip}")
    if experts.layout != "halves" or any(b is not None for b in (experts.gate_up_proj_bias, experts.down_proj_bias)):
        raise UnfitError("experts with biases, or without a gate projection, which no architecture has")
    if experts.bias is not None:
        raise UnfitError("a bias that is added to the experts' sum")
    found = Mixture(_rows(router), experts.gate_up_proj.detach(), experts.down_proj.detach(), 0, True)
    weighed = _weighed(found, route.router.choice, router)
    return replace(weighed, shared=_shared(layer))


def _rows(router: Router) -> Tensor:
    spec: RouterSpec = router.router
    weight = getattr(router, "weight", None)
    if str(spec.source) != "in" or spec.scorer != Linear(bias=False) or not isinstance(weight, Tensor):
        raise UnfitError(
            f"a router that reads {spec.source} with {spec.scorer}, in the place of one matrix without bias"
        )
    return weight.detach()


def _weighed(found: Mixture, choice: Choice, router: Router) -> Mixture:
    """With how experts are chosen and weighed."""
    bias = getattr(router, BIAS, None)
    if isinstance(bias, Tensor) and bool(bias.any()):
        raise UnfitError("a bias that selects experts (balance=bias) beside a softmax")
    if isinstance(choice, SoftmaxTopK) and choice.pre_activation == "none":
        return replace(found, router=_cooled(found.router, choice, router), k=choice.k, renorm=choice.sums_to_one)
    if isinstance(choice, Unweighted) and choice.k == found.experts:  # all of them, each whole: equal shares of E times
        return replace(found, router=torch.zeros_like(found.router), down=found.down * choice.k, k=choice.k)
    raise UnfitError(f"the choice {choice}, in the place of the k largest of a softmax")


def _cooled(rows: Tensor, choice: SoftmaxTopK, router: Any) -> Tensor:
    """The rows with the temperature of the softmax in them."""
    if choice.learned:
        return rows * torch.exp(-router.log_temperature.detach()).to(rows.dtype)
    temperature = getattr(router, "temperature", None)
    return rows if temperature is None else rows / temperature.to(rows.dtype)


def _shared(layer: Any) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The dense layer that stays, with its gate; without one it is half of twice the layer."""
    dense = getattr(layer, "shared", None)
    if not isinstance(dense, SharedExpert):
        return None
    if dense.gate_proj is None or any(name.endswith("bias") for name, _ in dense.named_parameters()):
        raise UnfitError("a shared expert with biases, or without a gate projection")
    gate, up, down = (m.weight.detach() for m in (dense.gate_proj, dense.up_proj, dense.down_proj))
    sigma = getattr(layer, "shared_gate", None)
    if sigma is None:
        return torch.zeros_like(gate[:1]), gate, up, 2 * down
    return sigma.weight.detach(), gate, up, down
