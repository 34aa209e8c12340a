"""ONNX exports of models of all kinds, plain and gated, and of every recipe: what became of each, and its CPU time.

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
from torch.utils import _pytree as pytree

import gatecc
from gatecc.capture.signature import split_inputs
from gatecc.checks import Case, Subject
from gatecc.errors import CaptureError, DecoderError, EmptySelectionError, GateccError
from gatecc.recipes.registry import RecipeInfo, build
from tests.acceptance.onnx_models import KINDS, built

MODELS = tuple(KINDS)
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
GATE = gatecc.Gate("activation[...].out", gatecc.GateSpec("self"))
LINE = re.compile(r"\w+\.pyi?:\d+")
STEP = re.compile(r"\w+\.(py|pyi):\d+: no decode step can be derived[^\n]*\n *found +.*(aten|gatecc)\.\w+")
PLACE = re.compile(r"\w+\.(py|pyi):\d+.*: (aten|prims|gatecc|torchvision|onnx|\w+)\.\w+")


class Result(NamedTuple):
    """One export: what became of it, its CPU time and its notes.

    ``became``: "written" (compared with torch, the same bytes twice), "refused" (by operator and line), "left" (there
    was nothing to rewrite), "wrong". ``sizes``: how many were compared.
    """

    said: str
    became: str
    seconds: float
    error: float | None = None
    nodes: int = 0
    batches: tuple[int, ...] = ()
    sizes: int = 0

    @property
    def right(self) -> bool:
        """Whether it is as it should be."""
        return self.became != "wrong"


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
    return built(name)


@torch.no_grad()
def randomised(model: nn.Module, plain: nn.Module) -> nn.Module:
    """The model with random values in what a transform has added."""
    known = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if name not in known:
            p.add_(torch.randn_like(p) * 0.3)
    return model


def exported(model: nn.Module, inputs: Any, *, decode: bool = False) -> Result:
    """Export twice. ``decode``: with the decode step; that there is none has to be said by operator and line."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = gatecc.export(model, Path(folder) / "x", inputs, decode=decode)
            seconds = time.process_time() - start
            # sizes that were given up are known by a comparison alone
            compared = any("as in the example" in note or "fixed, for" in note for note in made.notes)
            again = gatecc.export(model, Path(folder) / "y", inputs, verify=compared, decode=decode)
        except DecoderError as e:
            whole = exported(model, inputs)
            return whole._replace(said=f"{e}; {whole.said}", became=whole.became if STEP.search(str(e)) else "wrong")
        except Exception as e:
            told = str(e) if isinstance(e, GateccError) else f"raw {type(e).__name__}: {e}"
            named = LINE if isinstance(e, CaptureError) else PLACE  # a capture breaks at a line, at no operator yet
            known = isinstance(e, GateccError) and named.search(told) is not None
            return Result(told, "refused" if known else "wrong", time.process_time() - start)
    same = made.files["model.onnx"] == again.files["model.onnx"]
    same = same and made.files.get("decode.onnx") == again.files.get("decode.onnx")
    told = made.notes if same else ("other bytes the second time", *made.notes)
    return Result(
        "; ".join(told),
        "written" if same else "wrong",
        seconds,
        max(c.error for c in (*made.compared, *(made.decode.compared if made.decode else ()))),
        sum(made.operators.values()),
        tuple(sorted({c.sizes["batch"] for c in made.compared if "batch" in c.sizes})),
        len(made.compared),
    )


def of_recipe(name: str) -> Result:
    """A recipe on its host."""
    base, options = RECIPES.get(name, ("hf/llama-sdpa", {}))
    return _rewritten(*host(base), gatecc.recipe(name, **options))


def of_case(info: RecipeInfo, case: Case) -> Result:
    """A recipe on a model of its own registration, with random values in what it adds; models of tokens with the decode
    step."""
    torch.manual_seed(0)
    model, inputs = case.sample()
    subject = Subject(build(info.name, **case.options), model, *split_inputs(inputs))
    first = next(x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor))
    return exported(subject.moved, inputs, decode=not first.is_floating_point())


def plain_and_gated(name: str) -> Iterator[tuple[str, Result]]:
    """A model as it is, and with gated attention; where it has none, with a gate on each activation."""
    model, inputs = host(name)
    yield "plain", exported(model, inputs)
    yield "gated", _rewritten(model, inputs, gatecc.recipe("gated-attention"), GATE)


def _rewritten(model: nn.Module, inputs: Any, *recipes: Any) -> Result:
    """With the first of them that finds a place."""
    told = ""
    for recipe in recipes:
        try:
            changed = gatecc.transform(model, recipe, inputs, verify=False)
        except EmptySelectionError as e:
            told = f"not rewritten: {e.code} {e.what}"
        except GateccError as e:  # that a model is refused by a transform says nothing about exports
            return Result(f"not rewritten: {e.code} {e.what}", "left", 0.0)
        else:
            return exported(randomised(changed, model), inputs)
    return Result(told, "left", 0.0)
