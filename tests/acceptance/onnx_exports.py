"""ONNX exports of models of the zoo, plain and gated, and of every recipe: what became of each, and its CPU time.

Each is written twice; the bytes must be the same.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gatecc
from gatecc.errors import GateccError
from tests.zoo.models import find

MODELS = (
    *("hf/llama_padded-sdpa", "hf/qwen3-eager", "hf/mixtral-sdpa", "hf/gemma2-eager", "hf/phi3-sdpa", "hf/gpt2-sdpa"),
    *("hf/gpt_neox-sdpa", "hf/bloom-eager", "hf/mpt-eager", "hf/falcon-sdpa", "hf/opt-sdpa", "hf/gpt_oss-eager"),
    *("hf/qwen2_moe-sdpa", "hf/deepseek_v3-sdpa", "hf/bert_padded-sdpa", "hf/deberta_v2-eager", "hf/modernbert-sdpa"),
    *(
        "hf/t5-eager",
        "hf/bart-sdpa",
        "hf/whisper-sdpa",
        "hf/clip-sdpa",
        "hf/vit-sdpa",
        "hf/swin-sdpa",
        "hf/segformer-sdpa",
    ),
    *("timm/vit-sdpa", "timm/swin-eager", "timm/cait-eager", "timm/coatnet-sdpa", "timm/mobilevit-sdpa"),
    *("hf/mistral-sdpa", "hf/qwen2-sdpa", "hf/gemma3_text-sdpa", "hf/phi-sdpa", "hf/olmo2-sdpa", "hf/granite-sdpa"),
    *("hf/starcoder2-sdpa", "hf/qwen3_moe-sdpa", "hf/roberta-sdpa", "hf/distilbert-sdpa", "hf/albert-sdpa"),
    *("hf/xlnet-eager", "hf/esm-sdpa", "hf/pegasus-sdpa", "hf/dinov2-sdpa", "timm/convnext", "torchvision/resnet18"),
    *("torchvision/swin_t", "torchvision/maxvit", "torch/encoder", "torch/mha_cross", "hand/sdpa_gqa", "hand/alibi"),
)
IMAGE = "timm/vit-sdpa"
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-free": ("timm/vit-sdpa", {}),
    "context-gates": ("hf/bert-sdpa", {"context": "activation[0].out", "sites": "activation[1]"}),
    "gam": ("hf/llama-sdpa", {"slots": 5}),
    "gated-swinrmt": ("timm/swin-eager", {}),
    "hopfield": ("hf/bert-sdpa", {}),
    "liger": ("hf/llama-sdpa", {"window": 4}),
    "lina": (IMAGE, {"prefix": 1}),
    "lolcats": ("hf/llama-sdpa", {"window": 4}),
    "ninformer": (IMAGE, {}),
    "pgn": ("rnn", {}),
    "timestep-windows": ("tiny", {"timestep": "timestep"}),
    "token-head-gates": ("hf/bert-sdpa", {}),
    "value-gate": ("hf/llama-sdpa", {"activation": "1+tanh", "init": "identity"}),
    "vig": (IMAGE, {"prefix": 1}),
    "windowed-retention-gate": ("timm/swin-eager", {}),
}  # the others: a llama
PLACE = re.compile(r"\w+\.(py|pyi):\d+.*: (aten|prims|gatecc|torchvision|onnx|\w+)\.\w+")


class Result(NamedTuple):
    """One export: what became of it, and its CPU time."""

    said: str
    right: bool
    seconds: float
    error: float
    nodes: int = 0
    batches: tuple[int, ...] = ()


class Forecast(nn.Module):
    """Recurrent layers: (B, N, 5) -> (B, N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(5, 32, 2, batch_first=True), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


def host(name: str) -> tuple[nn.Module, Any]:
    """A model and example inputs."""
    torch.manual_seed(0)
    if name == "rnn":
        return Forecast().eval(), (torch.randn(3, 12, 5),)
    if name == "tiny":
        from tests.recipes.tiny import tiny

        return tiny(), (torch.randn(2, 6, 16), torch.tensor([3.0, 400.0]))
    case = find(name).build()
    return case.model, case.inputs


@torch.no_grad()
def randomised(model: nn.Module, plain: nn.Module) -> nn.Module:
    """The model with random values in what a transform has added."""
    known = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if name not in known:
            p.add_(torch.randn_like(p) * 0.3)
    return model


def exported(model: nn.Module, inputs: Any) -> Result:
    """Export once."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = gatecc.export(model, Path(folder) / "x", inputs)
            seconds = time.process_time() - start
            again = gatecc.export(model, Path(folder) / "y", inputs, verify=False)
        except Exception as e:
            told = str(e) if isinstance(e, GateccError) else f"raw {type(e).__name__}: {e}"
            known = isinstance(e, GateccError) and PLACE.search(told) is not None
            return Result(told, known, time.process_time() - start, float("nan"))
    error = max(c.error for c in made.compared)
    same = made.files == again.files or "as in the example" in " ".join(
        made.notes
    )  # what fails is not known uncompared
    batches = tuple(sorted({c.sizes["batch"] for c in made.compared if "batch" in c.sizes}))
    told = made.notes if same else ("other bytes the second time", *made.notes)
    return Result(", ".join(told), same, seconds, error, sum(made.operators.values()), batches)


def of_recipe(name: str) -> Result:
    """A recipe on its host."""
    base, options = RECIPES.get(name, ("hf/llama-sdpa", {}))
    return _rewritten(*host(base), name, options)


def plain_and_gated(name: str) -> Iterator[tuple[str, Result]]:
    """A model as it is, and with gated attention."""
    model, inputs = host(name)
    yield name, exported(model, inputs)
    if find(name).cores:
        yield f"{name} gated", _rewritten(model, inputs, "gated-attention", {})


def _rewritten(model: nn.Module, inputs: Any, recipe: str, options: dict[str, Any]) -> Result:
    try:
        changed = gatecc.transform(model, gatecc.recipe(recipe, **options), inputs, verify=False)
    except GateccError as e:  # that a model is refused by a transform says nothing about exports
        return Result(f"not transformed: {e.code} {e.what}", True, 0.0, float("nan"))
    return exported(randomised(changed, model), inputs)
