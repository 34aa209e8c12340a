"""The shared expert of Qwen's mixtures: beside the routed ones, scaled by a sigmoid."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gatecc.handoff.mixture import Mixture, SharedMatrices
from gatecc.handoff.source import Source, zeros_like
from gatecc.handoff.unfit import UnfitError

_IDLE = 8  # the width of a shared expert that is all zeros, where the model has none


def shared_options(source: Source, one: Mixture) -> dict[str, Any]:
    """The options of a mixture with a shared expert, in some layers or in all. Raises UnfitError."""
    widths = {m.shared.hidden if m.shared else _IDLE for m in source.mixtures.values()}
    if len(widths) > 1:
        raise UnfitError(f"its shared experts are of one width, the model's of {sorted(widths)}")
    return {
        "num_experts": one.experts,
        "num_experts_per_tok": one.k,
        "moe_intermediate_size": one.hidden,
        "shared_expert_intermediate_size": widths.pop(),
        "norm_topk_prob": one.renorm,
        "mlp_only_layers": source.dense,
    }


def shared_state(source: Source) -> dict[str, Tensor]:
    """Its weights. Without a gate it is half of twice the layer, without one at all it is zeros."""
    found: dict[str, Tensor] = {}
    for owner, mixture in source.mixtures.items():
        for name, weight in _matrices(mixture.shared, mixture.router).items():
            found[f"{owner}.{name}.weight"] = weight
    return found


def _matrices(shared: SharedMatrices | None, router: Tensor) -> dict[str, Tensor]:
    d = router.size(1)
    if shared is None:
        matrices = [zeros_like(router, *sizes) for sizes in ((1, d), (_IDLE, d), (_IDLE, d), (d, _IDLE))]
    elif shared.scale is None:
        matrices = [zeros_like(shared.up_proj, 1, d), shared.gate_proj, shared.up_proj, 2 * shared.down_proj]
    else:
        matrices = [shared.scale, shared.gate_proj, shared.up_proj, shared.down_proj]
    names = "shared_expert_gate", "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"
    return dict(zip(names, matrices, strict=True))
