"""What matchers find in a module, with the numbers that its values hold on the example inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from gatecc.capture import capture
from gatecc.ir.program import Program, attribute
from gatecc.ir.site import Refusal, Site
from gatecc.pipeline import Prepared, prepare


class _Recorder(fx.Interpreter):
    """Runs a program and keeps a copy of every tensor as it was when it was made, before writes in place."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.graph_module)
        self.program = program
        self.seen: dict[fx.Node, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        constant = self.program.constants.get(str(target))
        return attribute(self.program.module, str(target)) if constant is None else constant

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.seen[n] = result.detach().clone()
        return result


@dataclass
class Found:
    """The sites and refusals of one program."""

    program: Program
    all: Prepared

    def sites(self, kind: str) -> list[Any]:
        return [site for site in self.all.found if site.kind == kind]

    def owners(self, kind: str) -> list[str]:
        return [site.owner for site in self.sites(kind)]

    def refusals(self, kind: str) -> list[Refusal]:
        return [refusal for refusal in self.all.refusals if refusal.kind == kind]

    def codes(self, kind: str) -> list[str]:
        return [refusal.code for refusal in self.refusals(kind)]

    @cached_property
    def tensors(self) -> dict[fx.Node, Tensor]:
        recorder = _Recorder(self.program)
        with torch.no_grad():
            recorder.run(*(x.clone() for x in self.program.example))
        return recorder.seen

    def value(self, site: Site, stage: str) -> Tensor:
        """The tensor that a value of a site holds on the example inputs."""
        return self.tensors[site.values[stage].node]

    def axes(self, site: Site) -> dict[str, str]:
        return {stage: str(value.axes) for stage, value in site.values.items()}

    def parameter(self, fqn: str) -> Tensor:
        return cast(Tensor, attribute(self.program.module, self.program.relative_name(fqn)))

    def matrix(self, site: Site, role: str) -> Tensor:
        """A weight of a site as (out, in)."""
        weight = site.weights[role]
        tensor = self.parameter(weight.fqn).detach()
        if weight.orientation == "conv":
            return tensor.flatten(1)
        return tensor if weight.orientation == "out_in" else tensor.mT


def find(module: nn.Module, *args: Any, fqn: str = "", **kwargs: Any) -> Found:
    """Capture, canonicalize, match."""
    module.eval()
    program = capture(module, args, kwargs, fqn=fqn)
    return Found(program, prepare(program))


class Lambda(nn.Module):
    """A function as a module, parts by name: ``Lambda(lambda m, x: m.up(x), up=nn.Linear(2, 2))``."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)
