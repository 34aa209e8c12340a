"""The register: every architecture of the zoo, in every implementation that it has."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.zoo import decoys, handwritten, huggingface, plain, structures, vision
from tests.zoo.spec import Spec

SPECS: dict[str, Spec] = {
    spec.id: spec for module in (huggingface, vision, plain, handwritten, structures, decoys) for spec in module.specs()
}

FAST: tuple[str, ...] = (
    "hf/llama-sdpa",  # rotary, grouped heads, a materialised causal mask
    "hf/gpt2-eager",  # Conv1D projections
    "hf/gemma2-eager",  # soft cap, every other layer slides
    "hf/mixtral-sdpa",  # routers
    "hf/bert_padded-eager",  # the padding mask is an input
    "hf/t5-eager",  # cross-attention, relative bias, no scale
    "hf/albert-sdpa",  # one layer called twice
    "timm/swin-eager",  # shifted windows
    "timm/cait-eager",  # talking heads
    "torch/encoder",  # nn.TransformerEncoder
    "torch/mha_weights",  # nn.MultiheadAttention, opened
    "hand/gqa_einsum",
    "hand/manual_softmax",
    "hand/softmax_module",
    "hand/no_dense_mixture",  # a router that meets values in a matmul
)


def find(name: str) -> Spec:
    """The spec with this id. KeyError if there is none."""
    return SPECS[name]


def variants(*families: str, fast: bool = False) -> Iterator[tuple[str, Spec]]:
    """(id, spec) of all variants, or of these families, or of FAST. Families: hf, timm, torchvision, torch, hand."""
    for name, spec in SPECS.items():
        if (not families or spec.family in families) and (not fast or name in FAST):
            yield name, spec


def sample(every: int) -> list[tuple[str, Spec]]:
    """FAST, and one architecture in so many, in the implementation that its place picks; all with GATECC_ZOO=all."""
    if os.getenv("GATECC_ZOO") == "all":
        return list(variants())
    architectures: dict[tuple[str, str], list[str]] = {}
    for name, spec in SPECS.items():
        architectures.setdefault((spec.family, spec.name), []).append(name)
    picked = {names[i // every % len(names)] for i, names in enumerate(architectures.values()) if i % every == 0}.union(
        FAST
    )
    return [(name, spec) for name, spec in SPECS.items() if name in picked]
