"""MoCoOp: groups of soft prompts, chosen by what the image shows."""

from __future__ import annotations

from gatecc.ir.gates.choice import SoftmaxTopK
from gatecc.ir.gates.source import At, Cond
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.select import Selector
from gatecc.passes.branch.prompts import Prompts
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, recipe


@recipe(
    "mocoop",
    citation="Mixture of Prompt Learning for Vision Language Models (MoCoOp, 2024)",
    cases=[
        Case(
            samples.described, ("cost", "gradient", "reversible"), {"image": "text", "tokens": 2, "to": "head[...].in"}
        )
    ],
)
def mocoop(
    image: str,
    to: str,
    tokens: int = 4,
    start: int = 1,
    ids: tuple[int, ...] = (),
    groups: int = 4,
    k: int = 2,
    sites: str = "embedding[...]",
) -> tuple[Rewrite, ...]:
    """Groups of learned prompts before a text encoder; the image chooses k of them for each sample.

    z = W f, f the features of the image: the model's input ``image`` (B, C), or a value of the model that is selected
    (``head[visual_projection].out`` of a CLIP that is called with a text per image). The softmax over the k largest
    weighs the text features, sum over k of w_k * encoder(prompt_k), which are the value ``to``. The encoder runs k
    times, and no group that is not chosen runs. ``tokens`` embeddings from number ``start`` on are the prompt: leave
    room for them in the ids. ``ids`` are a template to start from; one group is CoOp. Train the prompts and the router,
    and the router with `gatecc.train.template_loss`.
    """
    chosen = Selector.parse(sites).out
    if groups == 1:
        return (Prompts(chosen, tokens, start, ids),)
    router = RouterSpec(At(image) if "[" in image else Cond(image), "linear", SoftmaxTopK(k), "random(0.02)")
    return (Prompts(chosen, tokens, start, ids, groups, router, Selector.parse(to)),)
