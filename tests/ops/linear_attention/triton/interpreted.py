"""The kernels in Triton's interpreter, against float64: the cases of test_interpreter.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gatecc.codegen.judge.interpreted import Findings, interpreting
from gatecc.ops.linear_attention import bidirectional, linear_attention
from gatecc.ops.linear_attention.kernels import KERNELS
from gatecc.ops.linear_attention.triton import launch
from gatecc.ops.linear_attention.triton.dispatch import GpuKernels
from tests.ops.linear_attention.cases import decays, double, leaves, operands, relative

KINDS = ("mild", "-3", "-12", "mixed", "zero", "one")
Errors = dict[str, float]


def every_decay(edges: list[int]) -> Errors:
    """Packed sequences; a head's channels have decays of every kind, and their gradients are judged apart."""
    given = operands("gated", H=1, N=edges[-1], Dk=18, Dv=16)
    given["log_decay"] = torch.cat([decays(kind, 1, 1, edges[-1], 3) for kind in KINDS], -1)
    found, truth = runs(given, cu_seqlens=torch.tensor(edges))
    errors = {name: relative(found[name], truth[name]) for name in found if name != "log_decay"}
    for i, kind in enumerate(KINDS):
        channels = slice(3 * i, 3 * i + 3)
        errors[f"log_decay {kind}"] = relative(found["log_decay"][..., channels], truth["log_decay"][..., channels])
    return errors


def grouped_heads() -> Errors:
    """Few heads of everything, one decay per head, odd sizes, operands with their tokens first, backwards, a state."""
    given = operands("gated", H=4, N=20, Dk=20, Dv=24, k=2, v=1, log_decay=2)
    given["log_decay"] = given["log_decay"][..., :1]
    given = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in given.items()}
    return judged({**given, "initial_state": torch.randn(1, 4, 20, 24)}, reverse=True)


def no_decay() -> Errors:
    """The linear rule in several blocks of channels."""
    return judged(operands("linear", H=1, N=33, Dk=72, Dv=16))


def blocks_of_channels() -> Errors:
    """The gated rule in several blocks of channels."""
    return judged(operands("gated", H=1, N=20, Dk=40, Dv=72, kind="mixed"))


def logits() -> Errors:
    """Logits for decays, padding, the normaliser."""
    given = operands("gated", B=2, H=1, N=20, Dk=16, Dv=16)
    given |= {
        "q": given["q"].abs(),
        "k": given["k"].abs(),
        "log_decay": 4 * given["log_decay"].new_empty(2, 1, 20, 16).normal_(),
    }
    mask = torch.arange(20)[None] >= torch.tensor([[0], [9]])
    return judged(given, gate_normalizer=16.0, normalize=True, mask=mask)


def constant_logit() -> Errors:
    """One logit a head for all tokens."""
    given = operands("gated", H=2, N=9)
    given["log_decay"] = torch.randn(1, 2, 1, 1)
    return judged(given, gate_normalizer=2.0)


def delta(rule: str, N: int) -> Errors:
    """Grouped heads, a state, a token that writes nothing."""
    given = operands(rule, H=2, N=N, Dk=20, Dv=12, kind="mixed", k=1, beta=1)
    given["beta"][:, :, 3:6] = 0
    return judged({**given, "initial_state": torch.randn(1, 2, 20, 12)})


def gated_delta_packed() -> Errors:
    """The gated delta rule backwards over packed sequences, one of them empty."""
    given = operands("gated_delta", H=1, N=45)
    given["log_decay"] = 2 * torch.randn_like(given["log_decay"])
    return judged(given, reverse=True, gate_normalizer=4.0, cu_seqlens=torch.tensor([0, 34, 34, 45]))


def alike_keys() -> Errors:
    """One key for all tokens, written with full strength: each value replaces the last."""
    given = operands("delta", H=1, N=32)
    given |= {"k": given["k"][:, :, :1].expand(1, 1, 32, 16), "beta": torch.ones(1, 1, 32)}
    return judged(given)


def half(rule: str, dtype: torch.dtype) -> Errors:
    """16-bit inputs; the errors are in units of what the dtype resolves, the state's in those of TF32."""
    found, truth = runs({name: x.to(dtype) for name, x in operands(rule, H=1, N=40).items()})
    units = {name: 2.0**-10 if name == "state" else torch.finfo(dtype).eps for name in found}
    return {name: relative(found[name], truth[name]) / units[name] for name in found}


def both_directions() -> Errors:
    """Both directions."""
    given = operands("gated", H=1, N=20)
    return {"o": relative(bidirectional(**given), bidirectional(**double(given)))}


def no_tokens() -> Errors:
    """The state comes back, and is another tensor."""
    state = torch.randn(1, 2, 16, 16)
    o, final = linear_attention(**operands("gated", N=0), initial_state=state)
    assert o.shape == (1, 2, 0, 16)
    assert final.data_ptr() != state.data_ptr()
    return {"state": relative(final, state)}


CASES: dict[str, Any] = {
    "every decay, N = 1, 63, 65, 130": lambda: every_decay([0, 1, 64, 129, 259]),
    "grouped heads": grouped_heads,
    "no decay": no_decay,
    "blocks of channels": blocks_of_channels,
    "logits": logits,
    "constant logit": constant_logit,
    "delta": lambda: delta("delta", 20),
    "gated delta": lambda: delta("gated_delta", 20),
    "gated delta, packed": gated_delta_packed,
    "alike keys": alike_keys,
    "bfloat16": lambda: half("gated", torch.bfloat16),
    "float16": lambda: half("gated_delta", torch.float16),
    "both ways": both_directions,
    "no tokens": no_tokens,
}


def runs(given: dict[str, Any], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and every gradient, by the kernels and in float64."""
    weights = torch.randn(*given["q"].shape[:3], given["v"].size(3))
    found: list[dict[str, Tensor]] = []
    for values in (leaves(given), leaves(double(given))):
        o, state = linear_attention(**values, **options)
        loss = (o * weights.to(o.dtype)).sum() + state.square().sum()
        grads = torch.autograd.grad(loss, list(values.values()))
        found.append({"o": o.detach(), "state": state.detach(), **dict(zip(values, grads, strict=True))})
    return found[0], found[1]


def judged(given: dict[str, Any], **options: Any) -> Errors:
    """The largest error of outputs and every gradient, relative to the largest value."""
    found, truth = runs(given, **options)
    return {name: relative(found[name], truth[name]) for name in found}


@dataclass(frozen=True)
class Run:
    """The errors of a case by name, and what the judge has found."""

    errors: Errors
    findings: Findings


def run(name: str) -> Run:
    """One case, by the kernels."""
    torch.manual_seed(0)
    with interpreting(launch) as findings, patch.dict(KERNELS, {"cpu": GpuKernels()}):
        return Run(CASES[name](), findings)
