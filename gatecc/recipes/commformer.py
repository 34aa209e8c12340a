"""CommFormer: agents that learn whom to listen to, and when."""

from __future__ import annotations

from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.edges import Edges
from gatecc.passes.gate import Gate
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "commformer",
    citation="Learning Multi-Agent Communication from Graph Modeling Perspective (CommFormer, 2024); the temporal gate "
    "as a reading of its abstract",
    cases=[
        Case(samples.sequences, ("identity", "cost", "reversible"), {"share": 1.0}),
        Case(samples.sequences, ("export",)),
        Case(samples.sequences_in_training, ("gradient",)),
    ],
)
def commformer(sites: str = "attention[...]", share: float = 0.4, T: float = 1.0) -> tuple[Rewrite, ...]:
    """Tokens are agents: each listens to the k = max(1, whole part of ``share`` n) best of n along learned edges.

    Edges e (n, n) start at 1 and are one table per layer. An agent's attention sees the agents of the k largest of its
    row alone: A_i = top-k(e_i + Gumbel noise) in training, straight through to softmax, and top-k(e_i) in eval. An edge
    that is not kept learns, too: what the output would change by if its message came. Another
    gate, the temporal one, reads what an agent observes: it takes the message where sigmoid(w x + b) > 1/2, also
    straight through, and starts open. With ``share=1`` the model starts as it was.

    Train ``*.edges.edges`` with an optimizer of its own, in turn with the rest (bi-level), and late with exact choices:
    set the buffers ``*.edges.noise`` to 0. Agents are few, and their scores are no cost that a kernel could leave out:
    it saves messages between agents, which no graph of one model holds. There is no skipping form.
    """
    attention = Selector.parse(sites)
    gate = GateSpec("hidden", "linear", "token", "threshold", "st(stochastic=False)")
    return AttentionEdit(attention, Edges(share, T), label="edges"), Gate(attention.out, gate, label="receives")
