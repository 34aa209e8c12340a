"""Tiny real models for ensembles, a count of their calls, and an ensemble computed by hand, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gatecc

LABELS = {0: "a", 1: "b", 2: "c"}
IDS = torch.randint(5, 50, (5, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([5]), 0)
TEXT = {"input_ids": IDS, "attention_mask": MASK}
PIXELS = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, id2label=LABELS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=50, id2label=LABELS, dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=16
    )
    return DistilBertForSequenceClassification(config)


@cache
def texts() -> gatecc.Ensemble:
    """Two text classifiers; the router may read the word embeddings of the first."""
    torch.manual_seed(0)
    large, small = bert(), distilbert()
    prompt: Any = large
    made = gatecc.ensemble(
        {"bert": large, "distil": small},
        TEXT,
        features={"prompt": prompt.get_input_embeddings()},
        inputs={"prompt": {"input": "input_ids"}},
    )
    return made.eval()


@cache
def images() -> gatecc.Ensemble:
    """A ViT of transformers and a ResNet of timm: parameters of other names, the logits of one and the tensor of the
    other."""
    import timm
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
            id2label=LABELS,
        )
    )
    resnet = timm.create_model("resnet18", num_classes=3, channels=(8, 8, 8, 8), stem_width=8)
    members = {"vit": vit, "resnet": resnet}
    return gatecc.ensemble(members, {"pixel_values": PIXELS}, inputs={"resnet": {"x": "pixel_values"}},
                           output={"vit": "logits"}).eval()  # fmt: skip


@contextmanager
def calls_of(ensemble: gatecc.Ensemble) -> Generator[dict[str, list[int]]]:
    """How many samples each call of each member had."""
    seen: dict[str, list[int]] = {name: [] for name in ensemble.members}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name].append(next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)).size(0))

        return hook

    handles = [m.register_forward_pre_hook(watch(n), with_kwargs=True) for n, m in ensemble.members.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tensor_of(output: Any) -> Tensor:
    """The logits of a model of transformers, or the tensor that another returns."""
    return getattr(output, "logits", output)


def by_hand(ensemble: gatecc.Ensemble, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Σ_e weights[b, e] f_e(x_b), each member on its own and one sample at a time."""
    rows: list[Tensor] = []
    for b in range(weights.size(0)):
        one: Any = pytree.tree_map(lambda x, b=b: x[b : b + 1], (args, kwargs))
        values = ensemble.outputs(ensemble.inputs.bind(*one), ensemble.members)
        rows.append(sum(weights[b, e] * tensor_of(values[n]) for e, n in enumerate(ensemble.members)))  # pyright: ignore[reportArgumentType] - a sum of tensors
    return torch.cat(rows)
