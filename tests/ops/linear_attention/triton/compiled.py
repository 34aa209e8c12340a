"""The launches of the kernels, for the judge: ``python -m tests.ops.linear_attention.triton.compiled`` prints them all.

Words after it choose: ``sm_90 gated bfloat16 64``.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
from torch import Tensor

from gatecc.codegen.judge.compiled import TARGETS, Launch, Resources, compile_launch, faults, recorded
from gatecc.ops.linear_attention.arguments import arguments
from gatecc.ops.linear_attention.problem import prepare
from gatecc.ops.linear_attention.triton import launch

KERNELS = ("scan", "mix", "differentiate", "solve", "strengths", "delta_scan", "delta_scan_backward")


def launches(target: str, rule: str, dtype: torch.dtype, D: int = 64, *, per_head: bool = False) -> list[Launch]:
    """All launches of forward and backward, of each kernel one for each set of constants."""

    def on_meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    decay = on_meta(1, 4, 64, 1 if per_head else D) if "gated" in rule else None
    beta = on_meta(1, 4, 64) if "delta" in rule else None
    q, k, v = (on_meta(1, 4, 64, D) for _ in range(3))
    a = arguments(q, k, v, decay, beta, gate_normalizer=None if decay is None else 16.0)
    with recorded(target, launch, KERNELS) as found:
        launch.forward(prepare(a))
        state = torch.empty(1, 4, D, D, device="meta")
        launch.backward(prepare(a), on_meta(1, 4, 64, D), state)
    return list({str((x.name, x.given)): x for x in found}.values())


def main() -> None:
    print(f"{'target':8}{'rule':13}{'dtype':10}{'D':>4} {'kernel':20}", *(f"{name:>9}" for name in Resources._fields))
    dtypes, rules = (torch.bfloat16, torch.float32), ("gated", "gated_delta", "linear", "delta")
    for target, rule, dtype, D in product(TARGETS, rules, dtypes, (64, 128, 256)):
        if not set(sys.argv[1:]) <= {target, rule, str(dtype)[6:], str(D)}:
            continue
        for made in launches(target, rule, dtype, D):
            found = compile_launch(made, target)
            bad = "  <-" if faults(found, target, matrix=False) else ""
            head = f"{target:8}{rule:13}{str(dtype)[6:]:10}{D:>4} {made.name:20}"
            print(head, *(f"{x:>9}" for x in found), bad, flush=True)


if __name__ == "__main__":
    main()
