"""Global workspace: a controller calls the modules of a model, in an order of its own."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Model
from gatecc.passes.loop.workspace import Workspace
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "global-workspace",
    citation="Coordinating information between modules through a global workspace (a reading of its abstract)",
    cases=[
        Case(samples.sequences, ("identity", "export", "reversible")),
        Case(samples.sequences, ("gradient", "reversible"), {"hard": False, "steps": 3}),
    ],
)
def global_workspace(
    blocks: str = "block[...]", steps: int = 0, hidden: int = 32, hard: bool = True
) -> tuple[Rewrite, ...]:
    """An LSTM controller gives, in each step, a probability to every block of a model; the most likely one is run.

    w is the stream, the workspace: (p_t, state_t) = LSTM(mean(w_t), state_(t-1)), w_(t+1) = block_i(w_t) with i =
    argmax p_t. A learned script of logits is added to p_t's, and at first names block t in step t: the model's own
    chain, exactly. A block that is not chosen gets no gradient and does not run for this sample; the controller learns
    through the probability of the block that was. ``hard=False`` runs all blocks, w_(t+1) = Σ_i p_i block_i(w_t), which
    is what is trained first in the paper, and changes the function from the start.

    The controller reads all positions, so a causal language model is causal no more, and has no KV cache.
    """
    return (Workspace(Model[...].out, blocks, steps, hidden, hard),)
