"""Packed rows in ONNX, and masks whose form only torch asserts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gatecc
from gatecc.errors import ExportError

pytest.importorskip("onnxruntime")
IDS = torch.randint(3, 41, (2, 9), generator=torch.Generator().manual_seed(0))
SHAPE: dict[str, Any] = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def test_packed_rows_are_exported_and_given_masks_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1, use_cache=False)).eval()
    student = gatecc.transform(model, "gla", (IDS,), verify=False)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]]).expand(2, -1).contiguous()
    made = gatecc.export(student, tmp_path / "packed", {"input_ids": IDS, "position_ids": positions})
    assert max(c.error for c in made.compared) <= 1e-5
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(ExportError, match="asserts the form of a mask"):
        gatecc.export(student, tmp_path / "given", {"input_ids": IDS, "attention_mask": mask})


def test_a_mask_that_the_model_makes_is_proved_in_the_whole_graph(tmp_path: Path) -> None:
    """Prefix sums follow the mask, though they replace nothing: the layer alone would assert a mask that it is
    given."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=1, use_cache=False)).eval()
    affine = gatecc.transform(model, "affine-attention", (IDS,), verify=False)
    with torch.no_grad():
        for name, p in affine.named_parameters():
            if "beta" in name or "alpha" in name:
                p.normal_()
    made = gatecc.export(affine, tmp_path / "affine", (IDS,))
    assert max(c.error for c in made.compared) <= 1e-5
