"""ONNX exports of models of the zoo, plain and gated, and of every recipe, all with weights that matter.

``python benchmarks/onnx_exports.py [--check]``; ``GATECC_ONLY=llama`` limits it, ``GATECC_ZOO=all`` takes the whole
zoo. An export that returns has been compared with torch at batch 1 and 3 and at two lengths; a refusal counts as right
if it is a GateccError that names the operator and its line. New parameters get random values: fresh gates do little and
would hide an error.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _table import Row, cpu_seconds, main
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import gatecc
from gatecc.errors import GateccError
from tests.zoo.models import find, variants

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
    *("torchvision/swin_t", "torchvision/maxvit", "torch/encoder", "torch/mha_cross", "hand/sdpa_gqa", "hand/alibi"),
)
IMAGE = "timm/vit-sdpa"
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-free": ("hf/gpt2-sdpa", {}),
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
    made: list[gatecc.export.Exported] = []  # pyright: ignore[reportFunctionMemberAccess]
    told = ""

    def work() -> None:
        nonlocal told
        with tempfile.TemporaryDirectory() as folder:
            try:
                made.append(gatecc.export(model, Path(folder) / "x", inputs))
            except GateccError as e:
                told = str(e)
            except Exception as e:
                told = f"raw {type(e).__name__}: {e}"

    seconds = cpu_seconds(work)
    if made:
        return Result(", ".join(made[0].notes), True, seconds, max(c.error for c in made[0].compared))
    return Result(told, bool(PLACE.search(told)), seconds, float("nan"))


def runs(only: str) -> Iterator[tuple[str, Result]]:
    """Every export, by its name."""
    for info in gatecc.recipes():
        base, options = RECIPES.get(info.name, ("hf/llama-sdpa", {}))
        if only in f"{info.name} on {base}":
            yield f"{info.name} on {base}", _rewritten(*host(base), info.name, options)
    names = [n for n, _ in variants()] if os.getenv("GATECC_ZOO") == "all" else MODELS
    for name in names:
        if only in name:
            yield from _plain_and_gated(name)


def _plain_and_gated(name: str) -> Iterator[tuple[str, Result]]:
    model, inputs = host(name)
    yield name, exported(model, inputs)
    if find(name).cores:
        yield f"{name} gated", _rewritten(model, inputs, "gated-attention", {})


def _rewritten(model: nn.Module, inputs: Any, recipe: str, options: dict[str, Any]) -> Result:
    try:
        changed = gatecc.transform(model, gatecc.recipe(recipe, **options), inputs)
    except GateccError as e:  # that a model is refused by a transform says nothing about exports
        return Result(f"not transformed: {e.code} {e.what}", True, 0.0, float("nan"))
    return exported(randomised(changed, model), inputs)


def measure() -> Iterator[Row]:
    """One row an export while it runs, then the shares."""
    only = os.getenv("GATECC_ONLY", "")
    results: dict[str, Result] = {}
    for name, result in runs(only):
        results[name] = result
        mark = "ok" if result.right and result.error == result.error else "refused" if result.right else "WRONG"
        print(f"{mark:<8}{result.seconds:6.1f} s  {result.error:8.1e}  {name}  {result.said}", flush=True)
    count = max(len(results), 1)
    written = sum(r.error == r.error for r in results.values())
    yield Row("exports tried", len(results))
    yield Row("written and compared", written / count)
    yield Row(
        "written, or refused by operator and line", sum(r.right for r in results.values()) / count, 1, at_most=False
    )
    yield Row("slowest", max((r.seconds for r in results.values()), default=0.0), 60, unit="s")
    yield Row("largest error", max((r.error for r in results.values() if r.error == r.error), default=0.0))


if __name__ == "__main__":
    main("onnx_exports", measure)
