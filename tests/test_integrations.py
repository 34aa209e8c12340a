"""Checkpoints of a Trainer hold the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import CheckpointError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
IDS = torch.randint(3, 60, (2, 8))


class Plain(nn.Module):
    """A model of no library, in the form that the Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 60)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = self.head(self.layer(self.embed(input_ids)))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())}
        return {**loss, "logits": x}


def _bert() -> nn.Module:
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, intermediate_size=16))


def _train(model: nn.Module, folder: Path, callbacks: list[Any]) -> Path:
    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.1}
    args = transformers.TrainingArguments(str(folder), max_steps=1, save_steps=1, **options)
    data = [{"input_ids": IDS[0], "labels": IDS[1]}] * 8
    transformers.Trainer(model=model, args=args, train_dataset=data, callbacks=callbacks).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize("make", [Plain, _bert])
def test_a_checkpoint_of_a_trainer_is_loaded_with_its_gates(make: Any, tmp_path: Path) -> None:
    from gatecc.integrations import SaveRecipe

    torch.manual_seed(0)
    model = gatecc.transform(make(), "gated-attention", {"input_ids": IDS}, verify=False)
    folder = _train(model, tmp_path, [SaveRecipe()])
    loaded = gatecc.load(make(), folder).eval()
    gates = [p for name, p in loaded.named_parameters() if "gate" in name]
    assert any(bool(p.any()) for p in gates)  # they start at 0
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS)["logits"], model(input_ids=IDS)["logits"])
        if make is _bert:
            assert torch.equal(gatecc.load(folder)(input_ids=IDS)["logits"], model(input_ids=IDS)["logits"])


def test_a_model_that_was_not_transformed_is_said(tmp_path: Path) -> None:
    from gatecc.integrations import SaveRecipe

    with pytest.raises(CheckpointError, match="not transformed"):
        _train(Plain(), tmp_path, [SaveRecipe()])
