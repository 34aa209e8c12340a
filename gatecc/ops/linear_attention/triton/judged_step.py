"""By what the judge tries the kernel of one token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.codegen.judge.family import Family
from gatecc.ops.linear_attention.reference import token_by_token
from gatecc.ops.linear_attention.triton.dispatch import STEP

Call = dict[str, Any]


def _call(rule: str, H: int = 2, Dk: int = 16, Dv: int = 16, *, heads: int | None = None) -> Call:
    """Operands of one token in float64, ``heads`` of k, v and the gates, and a state."""
    draw = partial(torch.randn, dtype=torch.float64)
    found: Call = {"q": draw(2, H, Dk), "k": F.normalize(draw(2, heads or H, Dk), dim=-1), "v": draw(2, heads or H, Dv)}
    if "gated" in rule:
        found["log_decay"] = F.logsigmoid(draw(2, heads or H, Dk))
    if "delta" in rule:
        found["beta"] = torch.rand(2, heads or H, dtype=torch.float64)
    return {**found, "state": draw(2, H, Dk, Dv)}


def _per_head() -> Call:
    """One decay per head, tokens before heads in memory."""
    given = _call("gated_delta", H=4, Dk=20, Dv=12, heads=2)
    turned = {n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in given.items() if n != "state"}
    return {**given, **turned, "log_decay": given["log_decay"][..., :1]}


def _run(given: Call) -> dict[str, Tensor]:
    module: Any = STEP.module()
    state = given["state"].float()
    after = torch.empty_like(state)
    q, k, v = (given[n] for n in "qkv")
    gates = (given.get("log_decay"), given.get("beta"))
    o = module.step(q, k, v, *gates, state, after, q.size(-1) ** -0.5, given.get("gate_normalizer"))
    return {"o": o, "after": after}


def _reference(given: Call) -> dict[str, Tensor]:
    state = given["state"].to(torch.promote_types(given["q"].dtype, torch.float32))
    H = state.size(1)
    q, k, v, decay, beta = (
        None if x is None else x.to(state.dtype).repeat_interleave(H // x.size(1), 1).unsqueeze(2)
        for x in map(given.get, ("q", "k", "v", "log_decay", "beta"))
    )
    assert q is not None
    assert k is not None
    assert v is not None
    strength = None if beta is None else beta.unsqueeze(3)
    if decay is not None and "gate_normalizer" in given:
        decay = F.logsigmoid(decay) / given["gate_normalizer"]
    o, after = token_by_token(q * q.size(-1) ** -0.5, k, v, decay, strength, state)
    return {"o": o.squeeze(2).to(given["q"].dtype), "after": after}


def _start(rule: str, D: int, dtype: torch.dtype) -> None:
    """A token of 8 rows of 16 heads of D channels."""
    on_meta = partial(torch.empty, device="meta")
    q, k, v = (on_meta(8, 16, D, dtype=dtype) for _ in range(3))
    decay = on_meta(8, 16, D) if "gated" in rule else None
    beta = on_meta(8, 16, dtype=dtype) if "delta" in rule else None
    module: Any = STEP.module()
    module.step(q, k, v, decay, beta, on_meta(8, 16, D, D), on_meta(8, 16, D, D), 1.0)


FAMILY = Family(
    name="linear_attention_step",
    launcher=STEP.name,
    cases={
        "linear": partial(_call, "linear", Dk=72, Dv=24),
        "gated": partial(_call, "gated"),
        "gated by logits": lambda: {**_call("gated"), "gate_normalizer": 16.0},
        "delta": partial(_call, "delta"),
        "gated delta, grouped heads": _per_head,
    },
    run=_run,
    reference=_reference,
    sizes={
        f"{rule}, D={D}": partial(_start, rule, D) for rule in ("linear", "gated", "gated_delta") for D in (64, 128)
    },
)
