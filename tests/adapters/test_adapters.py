"""Adapters of peft as experts, and experts as adapters of peft: what peft computes is the right value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc import adapters
from gatecc.errors import ArgumentError, CheckpointError
from gatecc.passes.branch.low_rank import Lora
from gatecc.recipes import samples

SUM = {"gate": "param, none, expert, linear, init=identity"}  # every expert with a weight of 1
IDS = samples.language()[1]


def _base() -> nn.Module:
    return samples.language()[0]


def _peft(seed: int, **config: Any) -> Any:
    """A PeftModel with an adapter that changes something."""
    settings: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down"]} | config
    model: Any = peft.get_peft_model(_base(), peft.LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def _loaded(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(_base(), str(folder)).eval()


@torch.no_grad()
def _call(model: Any) -> Tensor:
    return model(*IDS)


def _saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"alpha_pattern": {"down": 3}, "rank_pattern": {"down": 4}}])
def test_a_single_expert_is_what_peft_computes(config: dict[str, Any], tmp_path: Path) -> None:
    other = _peft(1, **config)
    model = adapters.load(_base(), [_saved(other, tmp_path)], IDS, options=SUM, verify=False)
    assert float((_call(other) - _call(_base())).abs().max()) > 0.1
    assert torch.allclose(_call(model), _call(other), atol=1e-5)


def test_experts_of_other_ranks_modules_and_scales_add_up_and_are_saved_one_by_one(tmp_path: Path) -> None:
    given = _peft(1), _peft(2, r=3, lora_alpha=3, target_modules=["q_proj", "up"])
    sources = [given[0], _saved(given[1], tmp_path / "second")]
    model: Any = adapters.load(_base(), sources, IDS, options=SUM)
    merged = _base()
    for one in given:  # the sum of the adapters, in the weights
        for name, module in one.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                merged.get_submodule(name).get_parameter("weight").data.add_(module.get_delta_weight("default"))
    assert torch.allclose(_call(model), _call(merged), atol=1e-5)
    bank = model.blocks[0].attn.q_proj.loras
    assert bank.a.shape == (2, 3, 16)
    assert not (bank.a[0, 2].any() | bank.b[0, 2].any())  # the padding
    assert not model.blocks[0].mlp.up.loras.b[0].any()  # the first adapts no such module
    for expert in range(2):
        adapters.save(model, folder := tmp_path / f"expert{expert}", expert)
        assert torch.allclose(_call(_loaded(folder)), _call(given[expert]), atol=1e-5)
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == [2, 3][expert]
    with pytest.raises(ArgumentError, match="no such expert"):
        adapters.save(model, tmp_path, 2)


def test_a_branch_with_one_adapter_is_saved_too(tmp_path: Path) -> None:
    branch = gatecc.Branch(gatecc.Linear["*.q_proj"].out, Lora(2))
    model = gatecc.transform(_base(), branch, IDS, verify=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(0.1) if ".lora." in name else None
    adapters.save(model, tmp_path)
    assert torch.allclose(_call(_loaded(tmp_path)), _call(model), atol=1e-5)


def test_an_adapter_that_is_no_module_of_its_own_is_not_saved(tmp_path: Path) -> None:
    model = gatecc.transform(_base(), gatecc.Branch(gatecc.MLP[...].out, Lora(2)), IDS, verify=False)
    with pytest.raises(CheckpointError, match="no form for this adapter"):
        adapters.save(model, tmp_path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["head"]}, "modules_to_save"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"target_modules": ["embed"]}, "lora_embedding"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match="no plain LoRA") as raised:
        adapters.read(_peft(1, **config))
    assert named in str(raised.value)


def test_another_kind_of_adapter_is_refused() -> None:
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = peft.get_peft_model(_base(), config)
    with pytest.raises(CheckpointError, match="IA3"):
        adapters.read(model)


def test_an_adapter_of_another_base_is_refused() -> None:
    one = adapters.read(_peft(1))[0]
    wide, renamed = dict(one.factors), {f"model.{name}": f for name, f in one.factors.items()}
    wide["blocks.0.mlp.down"] = wide["blocks.0.attn.q_proj"]
    with pytest.raises(CheckpointError, match=r"another base(.|\n)*model.blocks.0.attn.q_proj is not in the model"):
        adapters.load(_base(), [adapters.Adapter("x", renamed)], IDS)
    with pytest.raises(CheckpointError, match=r"another base(.|\n)*blocks.0.mlp.down of \(16, 32\)"):
        adapters.load(_base(), [adapters.Adapter("x", wide)], IDS)
    with pytest.raises(CheckpointError, match="holds adapters of peft already"):
        adapters.load(_peft(1), [one], IDS)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter_config.json and no adapter_model.safetensors"):
        adapters.read(tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapters of peft"):
        adapters.read(_base())
    with pytest.raises(CheckpointError, match="holds no low-rank adapters"):
        adapters.save(_base(), tmp_path)
    with pytest.raises(ArgumentError, match="no adapters"):
        adapters.load(_base(), [], IDS)
