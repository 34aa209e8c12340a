"""What a checkpoint holds: only what is new, the user's inputs or others, gathered tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gatecc
from gatecc.errors import ArgumentError, CheckpointError

X = torch.randn(2, 6, 16)


class Net(nn.Module):
    """Two attention layers; ``pick`` makes calls fail on values that the user's input does not hold."""

    def __init__(self, pick: float | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attend() for _ in range(2))
        self.norm = nn.BatchNorm1d(16)
        self.pick = pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pick is not None and not torch.compiler.is_exporting() and float(x[0, 0, 0]) != self.pick:
            raise ValueError("another input than at home")
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x.transpose(1, 2))


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(x).chunk(2, -1)))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _trained(base: nn.Module, recipe: Any) -> nn.Module:
    """A transformed model whose new parameters have moved, and nothing else."""
    model = gatecc.transform(base, recipe, (X,), verify=False)
    own = dict(base.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in own:
                p.add_(torch.randn_like(p))
            elif p.shape != own[name].shape:  # new rows: one per head, after the head's own eight
                p.unflatten(0, (2, -1))[:, own[name].shape[0] // 2 :].add_(1.0)
    return model


RECIPES: dict[str, Any] = {
    "gate": "gated-attention",
    "scaled": gatecc.recipe("gated-attention", init="identity(how=fold)"),
    "widened": gatecc.recipe("gated-attention", fuse_into="q"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_only_what_is_new_goes_onto_the_same_base(tmp_path: Path, name: str) -> None:
    base = Net().eval()
    base(torch.randn(4, 6, 16))
    model = _trained(base, RECIPES[name])
    gatecc.save(model, tmp_path, only_new=True)
    held = load_file(tmp_path / "new.safetensors")
    shapes = {n: t.shape for n, t in base.state_dict().items()}
    assert held.keys() == {n for n, t in model.state_dict().items() if shapes.get(n) != t.shape}
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.json", "new.safetensors", "example.safetensors"}
    other = Net().eval()
    other.load_state_dict(base.state_dict())
    loaded = gatecc.load(other, tmp_path)
    assert torch.equal(loaded(X), model(X))
    assert not torch.equal(loaded(X), base(X))
    with pytest.raises(CheckpointError, match=r"(?s)other weights.*save without only_new"):
        gatecc.load(Net().eval(), tmp_path)


def test_a_base_that_was_trained_too_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    base = Net().eval()
    model = _trained(base, "gated-attention")
    with torch.no_grad():
        model.get_parameter("layers.1.out.bias").add_(1e-3)
    gatecc.save(model, tmp_path, only_new=True)
    with pytest.raises(CheckpointError, match=r"layers\.1\.out\.bias: the base model has other weights"):
        gatecc.load(base, tmp_path)


def test_a_base_model_is_needed(tmp_path: Path) -> None:
    model = _trained(Net().eval(), "gated-attention")
    gatecc.save(model, tmp_path / "new", only_new=True)
    with pytest.raises(CheckpointError, match="holds only what is new"):
        gatecc.load(tmp_path / "new")
    gatecc.save(model, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"gatecc\.load\(model, folder\)"):
        gatecc.load(tmp_path / "whole")
    with pytest.raises(ArgumentError, match="folder is missing"):
        gatecc.load(Net())  # pyright: ignore[reportArgumentType]


def test_the_user_s_inputs_are_written_on_request_alone(tmp_path: Path) -> None:
    model = _trained(Net().eval(), "gated-attention")
    choices: list[tuple[Literal["synthetic", "keep"], bool]] = [("synthetic", False), ("keep", True)]
    for choice, kept in choices:
        gatecc.save(model, tmp_path / choice, example_inputs=choice)
        (held,) = load_file(tmp_path / choice / "example.safetensors").values()
        assert torch.equal(held, X) == kept
        assert torch.equal(gatecc.load(Net().eval(), tmp_path / choice)(X), model(X))
    with pytest.raises(ArgumentError, match="synthetic or keep"):
        gatecc.save(model, tmp_path, example_inputs="none")  # pyright: ignore[reportArgumentType]


def test_a_model_that_takes_its_own_inputs_alone_says_so(tmp_path: Path) -> None:
    model = gatecc.transform(Net(float(X[0, 0, 0])).eval(), "gated-attention", (X,), verify=False)
    with pytest.raises(CheckpointError, match=r"(?s)another input than at home.*keep"):
        gatecc.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    gatecc.save(model, tmp_path / "x", example_inputs="keep")


def test_gathered_tensors_take_the_place_of_the_model_s_own(tmp_path: Path) -> None:
    model = _trained(Net().eval(), "gated-attention")
    given = {name: t + 1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
    gatecc.save(model, tmp_path, state_dict=given)
    loaded = gatecc.load(Net().eval(), tmp_path)
    assert all(torch.equal(t, given[name]) for name, t in loaded.state_dict().items())


def test_the_folder_says_how_to_load_it(tmp_path: Path) -> None:
    gatecc.save(_trained(Net().eval(), "gated-attention"), tmp_path)
    assert "gatecc.load" in json.loads((tmp_path / "recipe.json").read_text())["note"]
