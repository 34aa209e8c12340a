"""By what the judge tries kernels of attention that are printed for what is made of its heads."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.codegen.judge.family import DTYPES, Exemption, Family
from gatecc.ops.attention.kernels import KERNELS
from gatecc.ops.attention.operator import attention
from gatecc.ops.attention.region import attention_region

OPTIONS: dict[str, Any] = {"causal": True, "window": 300}
H, G, D = 16, 4, 64


def _following(heads: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
    """A norm of each head, and a gate of a form that the operator has not."""
    return F.rms_norm(heads, (heads.size(-1),), scale, 1e-5) * (F.softplus(gate) + 0.5)


def _call() -> dict[str, Any]:
    heads, N, S = H // 4, 50, 350
    found = {"q": (1, heads, N, D), "k": (1, 2, S, D), "v": (1, 2, S, D), "sinks": (heads,), "gate": (1, heads, N, D)}
    return {name: torch.randn(shape).double() for name, shape in {**found, "scale": (D,)}.items()}


def _reference(given: dict[str, Any]) -> dict[str, Tensor]:
    with patch.dict(KERNELS, {}, clear=True):
        heads, logsumexp = attention(given["q"], given["k"], given["v"], sinks=given["sinks"], **OPTIONS)
    return {"out": _following(heads, given["gate"], given["scale"]), "logsumexp": logsumexp}


def _family(dtype: str) -> Family:
    kind = DTYPES[dtype]
    heads, scale = torch.empty(1, H, 50, D, dtype=kind), torch.empty(D, dtype=kind)
    module: Any = attention_region(_following, heads, (heads, scale), ["a sample of the judge"], **OPTIONS)

    def run(given: dict[str, Any]) -> dict[str, Tensor]:
        q, k, v, sinks, gate, scale = given.values()
        out, logsumexp = module.launch(q, k, v, None, sinks, gate, scale)
        return {"out": out, "logsumexp": logsumexp}

    def start(of: torch.dtype) -> object:
        q, k, scale = (torch.empty(s, dtype=of, device="meta") for s in ((1, H, 2048, D), (1, G, 2048, D), (D,)))
        return module.launch(q, k, k, None, torch.empty(H, dtype=of, device="meta"), q, scale)

    why = "each block of queries reads keys and values: from the L2 cache, on a GPU"
    return Family(
        name="attention region: norm and gate of heads",
        launcher=module.__name__,
        cases={"window, sinks, groups": _call},
        run=run,
        reference=_reference,
        sizes={f"D={D}": start},
        exemptions=(Exemption("kernel", "traffic", 3.5, why),),
        dtypes=(dtype,),
    )


def families() -> tuple[Family, ...]:
    """One for each dtype. Their files are written where the cache is now."""
    return tuple(map(_family, DTYPES))
