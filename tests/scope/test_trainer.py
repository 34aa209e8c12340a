"""transformers' Trainer with gradient checkpointing, bf16 and accumulation trains gates as a loop by hand does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from tests.compatibility.subject import Rewrite, base, inputs

RATE, STEPS = 0.5, 2


@pytest.mark.parametrize("recipe", ["gated-attention", "gla"])
def test_checkpointing_bf16_and_accumulation(recipe: str, tmp_path: Path) -> None:
    """Every row of the data is the same, so that a step on any of them, or on several, is the same step."""
    gated = Rewrite(recipe)(base())
    before = {name: p.detach().clone() for name, p in gated.named_parameters()}
    new = before.keys() - dict(base().named_parameters()).keys()
    right = by_hand(copy.deepcopy(gated))
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        bf16=True,
        use_cpu=True,
        optim="sgd",
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{name: x[0] for name, x in inputs().items()} for _ in range(8)]
    trainer = Trainer(gated, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert new
    for name, p in gated.named_parameters():
        moved, wanted = p.detach() - before[name], right.get_parameter(name).detach() - before[name]
        assert not (name in new and not wanted.any()), f"{name} does not train"
        assert (moved - wanted).abs().max() <= 0.05 * wanted.abs().max() + 1e-6, name


def by_hand(model: nn.Module) -> nn.Module:
    """Plain gradient descent on one row under autocast, without checkpointing."""
    model.train()
    row = {name: x[:1] for name, x in inputs().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**row).loss
        loss.backward()
        optimizer.step()
    return model
