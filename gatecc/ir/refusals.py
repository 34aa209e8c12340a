"""The causes of refusals: why a place that looks like a site is not taken. One entry a cause, with a stable code.

GCC100-129 attention, GCC130-199 the other kinds, GCC900-999 kinds of a package of your own. The entry is the manual
page (docs/errors/GCCnnn.md is generated from it), the refusal adds what was found at the place. A code is never given
to another cause.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import fx

from gatecc.errors import ArgumentError
from gatecc.ir.program import origin
from gatecc.ir.site import KINDS, Refusal


@dataclass(frozen=True)
class Cause:
    """``title`` names the cause, ``meaning`` says what the matcher could not do and why, ``remedy`` what one can do."""

    code: str
    title: str
    meaning: str
    remedy: str


_ATTENTION: tuple[Cause, ...] = (
    Cause(
        "GCC101",
        "the weights are changed between the softmax and the values",
        "CaiT's talking heads put a Linear over the heads there, DeepViT a convolution, differential attention "
        "subtracts "
        "two softmaxes. What meets the values is no softmax any more, and nothing that assumes one can be done "
        "with it.",
        "rewrite the owner's projections or its output (Linear sites)",
    ),
    Cause(
        "GCC102",
        "no product of queries and keys",
        "The softmax weighs values, but its input is no product of two computed tensors: learned-query pooling, "
        "additive "
        "attention, linear attention (softmax over features) and dense routing look so.",
        "none is needed for a router or a pooling; else compute both queries and keys with a layer",
    ),
    Cause(
        "GCC103",
        "the softmax weighs no values",
        "A softmax over a product of queries and keys that is multiplied with no values: a pointer network, a "
        "contrastive loss, an attention map that is returned.",
        "none is needed if the weights are the output; else multiply them with the values in the same module",
    ),
    Cause(
        "GCC104",
        "the softmax runs over another axis than the sum over values",
        "Slot attention normalises over the queries and sums over the keys, so that no query's weights sum to one.",
        "rewrite the owner's projections or its output (Linear sites)",
    ),
    Cause(
        "GCC105",
        "attention inside an opaque operator",
        "An operator such as flex_attention hides the scores, the mask or the values from the graph.",
        'choose another attention implementation (attn_implementation="sdpa" or "eager")',
    ),
    Cause(
        "GCC185",
        "attention inside an operator with a body of its own",
        "Operators such as torch.cond, while_loop, scan and checkpoint, and a region without gradients that writes to "
        "a buffer, hold code of the model as a graph of its own. gatecc enters regions of autocast and of no_grad; "
        "what stays in the others runs as it did.",
        "move the attention out of the operator, or write the region without writes to buffers",
    ),
    Cause(
        "GCC106",
        "the axes of a product are unclear",
        "The product of queries and keys, or of weights and values, has a form whose axes gatecc cannot name, "
        "such as an "
        "einsum of three operands.",
        "write the product with matmul, bmm or an einsum of two operands",
    ),
    Cause(
        "GCC107",
        "the scores are mixed between heads before the softmax",
        "Talking-heads attention puts a Linear over the heads between the product of queries and keys and the softmax, "
        "others a convolution or a mean. No head's scores are a product of its own queries and keys.",
        "rewrite the owner's projections or its output (Linear sites)",
    ),
    Cause(
        "GCC108",
        "a product over pairs that no lowering knows",
        "A product of two computed tensors, and a second one that sums a function of it: weights without a softmax, "
        "a softmax over heads, distances between tokens. It is neither softmax attention nor a recurrence that was "
        "proved, so it is compiled as it is written, and all pairs are stored.",
        "none is needed; a softmax over what the second product sums, or a recurrence, would become one operator",
    ),
)

_OTHERS: tuple[Cause, ...] = (
    Cause(
        "GCC130",
        "the weight is computed",
        "A product with a matrix that is not a parameter itself but computed from parameters (weight normalisation, "
        "standardised convolutions, a table look-up): there is no single parameter to read or edit.",
        "remove the parametrisation first (torch.nn.utils.parametrize.remove_parametrizations), or gate the output of "
        "the module that holds it",
    ),
    Cause(
        "GCC131",
        "a stack of weights",
        "A product with a parameter of three or more axes, usually a matrix per expert or head; Linear means one "
        "matrix.",
        "select the MLP or Attention site that holds it",
    ),
    Cause(
        "GCC132",
        "the weight stands on the left",
        "A product `W @ x`, which mixes the second last axis of x (often tokens), not its features.",
        "transpose the input in the model: x.mT @ W.T",
    ),
    Cause(
        "GCC186",
        "weights inside an operator with a body of its own",
        "A product with weights in the body of torch.cond, while_loop, scan, checkpoint or a region without gradients "
        "that writes to a buffer: gatecc does not look inside.",
        "move the layers out of the operator",
    ),
    Cause(
        "GCC140",
        "more than two layers",
        "A chain of three or more projections with activations between: a head or a decoder, not up, activation, down.",
        "select its Linear or Activation sites",
    ),
    Cause(
        "GCC141",
        "input and output differ",
        "Two projections with an activation between whose output has another width or size than the input (a "
        "classifier, a stem, a downsampling block): it does not map the stream to itself.",
        "select its Linear, Conv or Activation sites",
    ),
    Cause(
        "GCC142",
        "not on a token stream",
        "An MLP on one pooled vector per sample (squeeze-and-excite, conditioning), not on tokens or pixels.",
        "select its Linear, Conv or Activation sites",
    ),
    Cause(
        "GCC143",
        "depends on no input",
        "An MLP of constants, such as the position MLP of Swin v2: it makes a table, not a stream.",
        "none is needed: a gate on it would not depend on the input either",
    ),
    Cause(
        "GCC144",
        "experts not understood",
        "Stacked expert weights without one input and one output value of the module that holds them.",
        "select another site, or write the experts as one module with one output",
    ),
    Cause(
        "GCC150",
        "adds something that depends on no input",
        "An add or concatenation of the stream with a position table or learned tokens: nothing to choose between.",
        "select the Embedding site, or the stream after it",
    ),
    Cause(
        "GCC151",
        "part of attention scores",
        "A sum of scores before a softmax, such as content plus relative-position terms.",
        "select the scores of the Attention site",
    ),
    Cause(
        "GCC152",
        "adds something without weights",
        "An add or concatenation with a value computed from the inputs without any weight: masks, positions.",
        "select the stream after it",
    ),
    Cause(
        "GCC160",
        "a table of positions",
        "A look-up with indices that depend on no input: a position table or constant token types.",
        "select the token Embedding",
    ),
    Cause(
        "GCC161",
        "the model has no head",
        "No output of the model is a projection: they end in a normalisation, a residual stream or a token mixer.",
        "select Block or Residual sites, or pass the model with its head",
    ),
    Cause(
        "GCC170",
        "the block changes the shape",
        "A repeated unit whose output has another shape than its input, such as a stage that downsamples.",
        "select its inner Blocks or its Residual sites",
    ),
    Cause(
        "GCC171",
        "the block has no single input and output",
        "A repeated unit that reads or yields several values of the stream's shape, so that in and out are ambiguous.",
        "select its inner Blocks or its Residual sites",
    ),
)

CAUSES: dict[str, Cause] = {}


def declare(*causes: Cause) -> None:
    """Make causes known by their codes. Raises ArgumentError for a code that is another's."""
    for cause in causes:
        if cause.code in CAUSES:
            raise ArgumentError(
                "a code of a refusal is given twice",
                found=f"{cause.code} {cause.title}",
                expected=CAUSES[cause.code].title,
            )
        CAUSES[cause.code] = cause


declare(*_ATTENTION, *_OTHERS)


def fitted(refusal: Refusal, kinds: Collection[str]) -> Refusal:
    """The refusal with a remedy that names only ``kinds`` of sites: those that the model has."""
    named = [kind for kind, cls in KINDS.items() if re.search(rf"\b{cls.__name__}s?\b", refusal.remedy)]
    there = [KINDS[kind].__name__ for kind in named if kind in kinds]
    if len(there) == len(named):
        return refusal
    if there:
        return replace(refusal, remedy=f"select {' or '.join(there)} sites: the model has no other that would do")
    others = ", ".join(KINDS[kind].__name__ for kind in KINDS if kind in kinds and KINDS[kind].is_part)
    return replace(refusal, remedy=f"select sites that the model has: {others}" if others else "leave it as it is")


def refuse(code: str, kind: str, node: fx.Node, found: str = "", *, owner: str | None = None) -> Refusal:
    """The refusal of a place of ``kind`` at ``node``; ``found`` says what is special about this one.

    ``owner`` defaults to that of the node. Raises KeyError for a code that is not in the table.
    """
    cause = CAUSES[code]
    at = origin(node)
    reason = f"{cause.title}: {found}" if found else cause.title
    return Refusal(code, kind, at.owner if owner is None else owner, at.line, reason, cause.remedy)
