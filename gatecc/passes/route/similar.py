"""Similar: a router that starts with what its experts look for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gates.init import Init
from gatecc.passes.route.experts import Experts


@dataclass(frozen=True)
class Similar(Init, tag="similar"):
    """The row of an expert is the mean of the directions of its neurons: of their rows in the gate, or up without one.

    A token then goes to the experts whose neurons look for what it is (MoEfication, 2021). ``scale``: the length of the
    mean row. For a linear scorer that reads the input of the layer.
    """

    scale: float = 1.0

    def check(self) -> None:
        self.require(self.scale > 0, "scale", "a positive number")

    def fill(self, params: Mapping[str, Tensor], start: float, constant: str) -> None:
        for name in ("weight", "bias"):
            if name in params:
                params[name].zero_()  # until the experts are there: see `fill_similar`


def fill_similar(init: Similar, router: Any, experts: Experts) -> None:
    """Write a router from its experts. Raises ArgumentError for one that does not score the experts' input linearly."""
    weight: Tensor = router.get_parameter("weight")
    rows = experts.gate_up_proj
    rows = rows[:, : rows.size(1) // 2] if experts.layout == "halves" else rows
    means = torch.nn.functional.normalize(rows.float(), dim=-1).mean(1)
    if weight.shape != means.shape:
        raise ArgumentError(
            "the router has no row in the experts' input for each expert",
            found=f"a weight of shape {tuple(weight.shape)}",
            expected=f"{tuple(means.shape)}: source in, scorer linear",
        )
    weight.copy_(means * (init.scale / means.norm(dim=-1).mean().clamp_min(1e-12)))
