"""FuseExperts: one operator in the place of how a model dispatches tokens to the experts that it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gatecc.ir.contract import Contract, exact
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site
from gatecc.passes.expert_formula import Call, formula, one_operator, stacks, swapped
from gatecc.passes.operands import stage


@dataclass(frozen=True)
class FuseExperts(Rewrite):
    """Let one operator, ``gatecc::moe_ffn``, compute the experts of a site, in the place of the model's own dispatch.

    The function stays: which activation and which layout of the weights the experts have is proved on random numbers,
    and experts that compute anything else are refused. Weights are read as they lie, transposed ones too; router, hooks
    on the module of the experts and the state dict stay as they are. The values between the products are gone, so gates
    on ``hidden`` come without this rewrite.
    """

    name = "fuse_experts"

    def contract(self) -> Contract:
        return exact()

    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def reads(self) -> Iterable[str]:
        return ("in", "weights", "indices", "out")

    def rewrite(self, site: Site, edit: Editor) -> None:
        held = stacks(site, edit.program)
        call = Call(*(stage(site, name).node for name in ("in", "weights", "indices", "out")))
        options = formula(site, edit.program, call, training=True)
        dtype = call.out.meta["val"].dtype
        y = edit.call(
            one_operator, call.x, call.weights, call.indices, *held, swapped(site), dtype, *options, name="experts"
        )
        edit.replace(call.out, y)
        edit.discard(call.out, inside=True)
