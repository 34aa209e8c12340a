"""Mixture: what a layer that `Route` made computes, in the terms of the architectures of transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatecc.handoff.unfit import UnfitError
from gatecc.ir.gates.choice import BIAS, Choice, SoftmaxTopK
from gatecc.ir.gates.choices.sigmoid import SigmoidTopK
from gatecc.ir.gates.choices.unweighted import Unweighted
from gatecc.ir.gates.scorer import Linear
from gatecc.ir.router import Router, RouterSpec
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.route import Route
from gatecc.passes.route.shared import SharedExpert


@dataclass(frozen=True)
class SharedMatrices:
    """An expert that every token takes: ``gate_proj``, ``up_proj`` (F, d), ``down_proj`` (d, F), scaled by
    sigma(scale x) where there is a ``scale`` (1, d)."""

    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    scale: Tensor | None

    @property
    def hidden(self) -> int:
        return self.up_proj.size(0)


@dataclass(frozen=True)
class Mixture:
    """``router`` (E, d), ``gate_up`` (E, 2F, d) with the rows of the gate first, ``down`` (E, d, F); the k largest of
    softmax(router x), or of sigma(router x), weigh the experts, divided by their sum with ``renorm``, times ``factor``.

    A sigmoid's experts are in ``groups``, of which ``limit`` may be chosen from, by score + ``bias`` (E,)."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    k: int
    renorm: bool
    scores: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    limit: int = 1
    factor: float = 1.0
    bias: Tensor | None = None
    shared: SharedMatrices | None = None

    @property
    def experts(self) -> int:
        return self.router.size(0)

    @property
    def hidden(self) -> int:
        return self.down.size(2)

    @property
    def shape(self) -> tuple[int, int, int, bool, str, int, int, float]:
        """What layers of one architecture have in common."""
        grouped = self.groups, self.limit, self.factor
        return self.experts, self.hidden, self.k, self.renorm, self.scores, *grouped


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
    if isinstance(choice, SigmoidTopK):
        groups = (choice.groups, choice.limit) if choice.limit < choice.groups else (1, 1)
        found = replace(found, scores="sigmoid", k=choice.k, renorm=choice.renorm, factor=choice.scale, bias=bias)
        return replace(found, groups=groups[0], limit=groups[1])
    if isinstance(bias, Tensor) and bool(bias.any()):
        raise UnfitError("a bias that selects experts (balance=bias) beside a softmax")
    if isinstance(choice, SoftmaxTopK) and choice.pre_activation == "none":
        return replace(found, router=_cooled(found.router, choice, router), k=choice.k, renorm=choice.sums_to_one)
    if isinstance(choice, Unweighted) and choice.k == found.experts:  # all of them, each whole: equal shares of E times
        return replace(found, router=torch.zeros_like(found.router), down=found.down * choice.k, k=choice.k)
    raise UnfitError(f"the choice {choice}, in the place of the k largest of a softmax or a sigmoid")


def _cooled(rows: Tensor, choice: SoftmaxTopK, router: Any) -> Tensor:
    """The rows with the temperature of the softmax in them."""
    if choice.learned:
        return rows * torch.exp(-router.log_temperature.detach()).to(rows.dtype)
    temperature = getattr(router, "temperature", None)
    return rows if temperature is None else rows / temperature.to(rows.dtype)


def _shared(layer: Any) -> SharedMatrices | None:
    """The dense layer that stays, with its gate if there is one."""
    dense = getattr(layer, "shared", None)
    if not isinstance(dense, SharedExpert):
        return None
    if dense.gate_proj is None or any(name.endswith("bias") for name, _ in dense.named_parameters()):
        raise UnfitError("a shared expert with biases, or without a gate projection")
    gate, up, down = (m.weight.detach() for m in (dense.gate_proj, dense.up_proj, dense.down_proj))
    sigma = getattr(layer, "shared_gate", None)
    return SharedMatrices(gate, up, down, None if sigma is None else sigma.weight.detach())
