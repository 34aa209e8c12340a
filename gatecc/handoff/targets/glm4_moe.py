"""GLM-4.5: experts that a sigmoid chooses, in groups, beside a shared one: the mixture of DeepSeek-V3 on usual
attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.handoff.mixture import Mixture, SharedMatrices
from gatecc.handoff.source import Source, zeros_like
from gatecc.handoff.target import Target, alike, stacked, ungated
from gatecc.handoff.unfit import UnfitError


class Glm4Moe(Target):
    """Queries and keys may be normalised per head, queries, keys and values may have biases. The shared expert is as
    wide as a number of experts: one of another width is filled up with zeros, and so is one that the model lacks."""

    name = "glm4_moe"
    prefix = "Glm4Moe"

    def options(self, source: Source) -> dict[str, Any]:
        ungated(source)
        one = alike(source, dense=True, scores="sigmoid", shared=True)
        first = len(source.dense)
        if source.dense != list(range(first)):
            raise UnfitError(f"its dense layers are the first ones, the model's are {source.dense}")
        if any(m.shared is not None and m.shared.scale is not None for m in source.mixtures.values()):
            raise UnfitError("its shared expert has no gate")
        return {
            "n_routed_experts": one.experts,
            "num_experts_per_tok": one.k,
            "moe_intermediate_size": one.hidden,
            "n_shared_experts": _shared_experts(source, one),
            "norm_topk_prob": one.renorm,
            "n_group": one.groups,
            "topk_group": one.limit,
            "routed_scaling_factor": one.factor,
            "first_k_dense_replace": first,
            "intermediate_size": source.config.intermediate_size,
            "use_qk_norm": any(name.endswith("q_norm.weight") for name in source.rest),
            "attention_bias": any(name.endswith("q_proj.bias") for name in source.rest),
            "partial_rotary_factor": 1.0,
            "num_nextn_predict_layers": 0,
        }

    def state(self, source: Source) -> dict[str, Tensor]:
        found = source.rest | stacked(source)
        for owner, mixture in source.mixtures.items():
            bias = torch.zeros(mixture.experts, device=mixture.router.device) if mixture.bias is None else mixture.bias
            found[f"{owner}.gate.e_score_correction_bias"] = bias.float()
            width = _shared_experts(source, mixture) * mixture.hidden
            for name, weight in _filled_up(mixture, width).items():
                found[f"{owner}.shared_experts.{name}.weight"] = weight
        return found


def _shared_experts(source: Source, one: Mixture) -> int:
    """The width of the shared expert, in experts."""
    widest = max((m.shared.hidden for m in source.mixtures.values() if m.shared), default=0)
    return max(1, -(-widest // one.hidden))


def _filled_up(mixture: Mixture, width: int) -> dict[str, Tensor]:
    """The shared expert with neurons that add nothing."""
    d = mixture.router.size(1)
    none = (zeros_like(mixture.router, *sizes) for sizes in ((0, d), (0, d), (d, 0)))
    shared = mixture.shared or SharedMatrices(*none, scale=None)
    more = width - shared.hidden
    rows = {name: F.pad(getattr(shared, name), (0, 0, 0, more)) for name in ("gate_proj", "up_proj")}
    return {**rows, "down_proj": F.pad(shared.down_proj, (0, more))}
