"""Attention-Gate: a learned flag per token and head evicts keys and values from the cache."""

from __future__ import annotations

from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.evict import Evict
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "attention-gate",
    citation="In-context KV-Cache Eviction for LLMs via Attention-Gate (2024); with a budget Paging with Succinct "
    "Predictions (2022)",
    cases=[
        Case(samples.language, ("identity", "causality", "cost", "export", "state", "reversible")),
        Case(samples.language, ("causality", "export", "state"), {"budget": 4, "recent": 2, "hidden": 4}),
        Case(samples.language_in_training, ("gradient",), {"target": 0.5}),
        Case(samples.sequences, ("identity", "export")),
    ],
)
def attention_gate(
    sites: str = "attention[...]",
    target: float = 0.5,
    weight: float = 1.0,
    budget: int = 0,
    recent: int = 0,
    hidden: int = 0,
    bias: float = 2.0,
) -> tuple[Rewrite, ...]:
    """Let go of keys and values that a gate flags, per token and key head: later queries do not see them.

    f = 1[sigma(w_h x + b_h) > cut] for token x of the layer's input and key head h (``hidden`` puts a layer of so many
    features before it). Query i sees key j where f_j = 1 or j = i: what is evicted is gone, which is something else
    than a value of zero. The gate starts at sigma(``bias``), above ``cut`` = 1/2: everything is kept, and the model
    computes what it did. ``gate.cut`` is a buffer, a dial of the finished model.

    In training mode everything is computed and masked. Flags have a straight-through gradient: of the output with
    respect to a key's presence, also for keys that are hidden, and of sigma in the place of the step. The loss
    ``weight`` (mean f - ``target``)², one per layer, enters in the backward pass (`gatecc.aux_losses`). Train the gates
    alone with ``gatecc.train.heal(model, None, data, tune=Tune(steps, train=("*gate.*",)))``, or with the model.

    The paper's gate attends to the whole prompt first, so that a flag depends on later tokens. This one reads its
    token's layer input, in which the layers before have mixed what came before it: outputs never depend on later
    tokens, and a decoder exists.

    The skipping form is the decoder's (`gatecc.decoder`, and ``generate``): a head's cache holds what it kept and
    a little room, heads and samples each their own number, and a step reads no more. ``decoder.memory.bytes(state)``
    is what it holds. The full forward without gradients gathers the kept keys too. Padding is never held.

    ``recent``: so many of the newest tokens are held whatever their flags say, and come under them as they get older.
    What a flag decides is then whether a token is needed later on, which is easier to learn than to do without the
    last word. Take 32 or so.

    With a ``budget`` a head holds at most so many tokens, and flags are predictions: a flagged token stays while there
    is room. Then the oldest flagged one goes first, and where none is left the oldest of all. A token that is wrongly
    kept may push out a newer one that is flagged, but none of the ``recent`` ones, which count in the budget: however
    wrong flags are, a head sees no less than a window of these, and where the tokens that are needed later fit beside
    them and flags are right, nothing that is needed leaves. A budget changes the function from the start.

    A byte LM of four layers at 512 bytes, whose gates alone had 40 steps, with 3/4, 1/2 and 1/4 of its bytes held:
    1.004, 1.014 and 1.023 times the bits per byte of the dense model with ``recent=32``, and 1.24, 2.46 and 3.25 times
    without, where a flagged token is gone for the very next one, which most models have to be trained for. That model
    reads what is near: a window of as many bytes (a budget, and gates as they start) costs it 1.000 at 1/2 and 1.004 at
    1/4, and ``recent=128`` 1.002 at 1/2 (``examples/evict.py``).
    """
    change = Evict(target, weight, budget, recent, hidden, bias)
    return (AttentionEdit(Selector.parse(sites), change, label="gate"),)
