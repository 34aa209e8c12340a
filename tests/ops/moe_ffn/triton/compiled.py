"""The launches of the kernels, for the judge: ``python -m tests.ops.moe_ffn.triton.compiled`` prints them all.

Words after it choose: ``sm_90 bfloat16 many project``.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
from torch import Tensor

from gatecc.codegen.judge.compiled import TARGETS, Launch, Resources, compile_launch, faults, recorded
from gatecc.ops.moe_ffn.arguments import arguments
from gatecc.ops.moe_ffn.triton import launch

KERNELS = ("project", "activate", "outer", "add_slots")
LOADS = {"few": 8, "some": 128, "many": 1024}  # tokens, two slots each, of eight experts


def launches(
    target: str,
    dtype: torch.dtype,
    tokens: int,
    *,
    backward: bool = True,
    layout: str = "halves",
    activation: str = "silu",
) -> list[Launch]:
    """All launches of forward, with and without gradients, and backward, of each kernel one for a set of constants."""

    def on_meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    d, F, E = 1024, 2816, 8
    given = (on_meta(tokens, d), on_meta(tokens, 2, of=torch.float32), on_meta(tokens, 2, of=torch.int64))
    held = (on_meta(E, 2 * F, d), on_meta(E, d, F), on_meta(E, 2 * F), on_meta(E, d))
    a = arguments(*given, *held, activation_text=activation, layout=layout)
    with recorded(target, launch, KERNELS) as found:
        launch.forward(a, keep=False)
        launch.forward(a, keep=True)
        launch.backward(a, on_meta(tokens, d), on_meta(2 * tokens, 2 * F), [True] * 6)
    return list({_specialised(x): x for x in found}.values())


def _specialised(made: Launch) -> str:
    """What decides of how a launch is compiled, as far as it differs within a call."""
    constants = {p.name: made.given[p.name] for p in made.kernel.params if p.is_constexpr}
    there = [p.name for p in made.kernel.params if made.given[p.name] is None]
    return str((made.name, constants, there))


def main() -> None:
    print(f"{'target':8}{'dtype':10}{'load':6}{'kernel':11}", *(f"{name:>9}" for name in Resources._fields), " N, K")
    for target, dtype, (load, tokens) in product(TARGETS, (torch.bfloat16, torch.float32), LOADS.items()):
        for made in launches(target, dtype, tokens):
            if not set(sys.argv[1:]) <= {target, load, str(dtype)[6:], made.name}:
                continue
            found = compile_launch(made, target)
            bad = "  <-" if faults(found, target, matrix=made.name != "add_slots") else ""
            sizes = [made.given[name] for name in ("N", "K", "BM", "BN", "BK") if name in made.given]
            print(
                f"{target:8}{str(dtype)[6:]:10}{load:6}{made.name:11}",
                *(f"{x:>9}" for x in found),
                sizes,
                bad,
                flush=True,
            )


if __name__ == "__main__":
    main()
