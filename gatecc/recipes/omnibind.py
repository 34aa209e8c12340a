"""OmniBind: the embeddings of several spaces, weighted for each sample, as one."""

from __future__ import annotations

from gatecc.ir.gates.choices.models import Independent
from gatecc.ir.gates.scorer import MLP
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Model
from gatecc.passes.ensemble.choose import Choose
from gatecc.recipes import ensembles
from gatecc.recipes.registry import Case, recipe


@recipe(
    "omnibind",
    citation="OmniBind: Large-scale Omni Multimodal Representation via Binding Spaces (2024)",
    cases=[Case(ensembles.spaces, ("cost", "gradient", "export", "reversible"), {"hidden": 8})],
)
def omnibind(reads: str = "members", hidden: int = 100) -> tuple[Rewrite, ...]:
    """y = z / |z|, z = Σ_e σ(MLP(e_1, ..., e_n))_e e_e over the embeddings of all members.

    Members are encoders of one modality; ``gatecc.ensemble(..., output=..., project={member: projector})`` brings their
    embeddings to one width, and frozen projectors stay frozen. The router reads all embeddings by default. The paper's
    trunk with batch norms (in → 512 → 100) is given as a feature that reads the members; then ``reads`` names it.
    """
    return (Choose(Model[...], RouterSpec(reads, MLP(hidden, "tanh"), Independent()), combine="unit"),)
