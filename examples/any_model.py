"""The demo's task for a model that nothing is known of: gates that were shaken learn to give its outputs back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import gatecc
from gatecc.capture.adapters import adapted
from gatecc.cli.reference import load_model
from gatecc.engine.analyse import split_inputs

SHAKE = 0.3  # standard deviation of what is added to the gates' parameters
NOISE = 0.1  # what sets the inputs of training apart from those of the measurement, relative to their own deviation
# Kinds of sites in the order in which a gate there tells most, and the gate that fits every model that has one.
KINDS = {"residual": "branch", "mlp": "out", "conv": "out", "linear": "out"}


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The floating-point tensors that a model yields, in order."""
    args, kwargs = split_inputs(inputs)
    with adapted(model):  # no caches: their tensors are state, not results
        out = model(*args, **kwargs)
    return [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]


class AnyModel:
    """``module:factory``, which returns (model, example_inputs)."""

    skipped = "similarities and retrieval (they need sentences and a tokenizer); other batch sizes (only one is known)"

    def __init__(self, reference: str) -> None:
        self.model, self.inputs = load_model(reference, None)
        self.model.eval()
        self.title = f"{type(self.model).__name__} from {reference}"
        self.about = "its example inputs; floating-point ones vary a little from step to step"
        with torch.no_grad():
            self._target = outputs(self.model, self.inputs)
        self._teacher = copy.deepcopy(self.model).requires_grad_(False)

    def recipe(self, report: gatecc.Report) -> gatecc.Recipe:
        """Gated attention if there is attention, else gates of another kind of site that there is."""
        found = {site.kind for site in report.sites}
        if "attention" in found:
            return gatecc.recipe("gated-attention")
        kind = next((kind for kind in KINDS if kind in found), "linear")  # if there is none, the error says so
        gate = gatecc.Gate(gatecc.Selector(kind, ..., KINDS[kind]), gatecc.GateSpec("self", "linear", "element"))
        return gatecc.Recipe(f"gates on {kind} sites", "", (gate,))

    def probes(self) -> list[Any]:
        """The example inputs, since no others are known to be valid."""
        return [self.inputs]

    @torch.no_grad()
    def start(self, model: nn.Module) -> str:
        """Shake the trainable parameters, which are those of the gates."""
        for p in model.parameters():
            if p.requires_grad:
                p.add_(SHAKE * torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
        return "gates were shaken and learn to give the outputs of the original back"

    def loss(self, model: nn.Module) -> Tensor:
        """The distance from the original on the example inputs with a little noise."""
        noisy = tree_map(_noisy, self.inputs)
        with torch.no_grad():
            target = outputs(self._teacher, noisy)
        return _distance(outputs(model, noisy), target)

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, str]:
        """The distance from the original on the example inputs as they are."""
        return {"distance from the original": f"{_distance(outputs(model, self.inputs), self._target):.2e}"}

    def similarities(self, model: nn.Module) -> list[tuple[str, str, float]]:
        """None: the model may read anything."""
        return []


def _noisy(x: Any) -> Any:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() < 2:
        return x
    return x + NOISE * x.std() * torch.randn_like(x)


def _distance(found: list[Tensor], target: list[Tensor]) -> Tensor:
    """Mean squared error relative to the target's variance."""
    parts = [(a - b).square().mean() / b.square().mean().clamp(min=1e-12) for a, b in zip(found, target, strict=True)]
    return torch.stack(parts).mean()
