"""Checkpoints: bitwise outputs after loading, and a clear error for each way in which a folder or base is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import ArgumentError, CheckpointError
from gatecc.transform import history

ATTENTION = "gated-attention"
MLP_GATE = gatecc.Gate(gatecc.MLP[...].out, gatecc.GateSpec("self", "linear", "token", "sigmoid"), label="out_gate")


class Attend(nn.Module):
    """Self-attention over x: (B, N, D)."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linears with a GELU between them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Tiny(nn.Module):
    """Two residual blocks between an embedding and a head that may share its weight; one buffer that training moves."""

    def __init__(self, width: int = 16, *, tied: bool = True, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.attend = nn.ModuleList(Attend(width) for _ in range(layers))
        self.ffn = nn.ModuleList(FeedForward(width) for _ in range(layers))
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, options: dict[str, Any] | None = None) -> torch.Tensor:
        x = self.embed(ids)
        for attend, ffn in zip(self.attend, self.ffn, strict=True):
            x = x + attend(x, (options or {}).get("mask"))
            x = x + ffn(x)
        return self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def ids(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 11, (batch, length))


def gated(recipe: Any = ATTENTION, scope: Any = "auto", **options: Any) -> nn.Module:
    """A transformed model whose parameters have moved away from the identity."""
    model = gatecc.transform(Tiny(**options).eval(), recipe, (ids(),), scope=scope, verify=False)
    perturb(model)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """One transformed model for all tests that only read it."""
    return gated()


@pytest.fixture(scope="module")
def checkpoint(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    gatecc.save(model, folder)
    return folder


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to be damaged."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)


def assert_same(saved: nn.Module, loaded: nn.Module, x: torch.Tensor) -> None:
    assert torch.equal(saved(x), loaded(x))
    assert list(saved.state_dict()) == list(loaded.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(saved.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("scope", ["auto", "model"])
def test_a_fresh_base_model_gives_bitwise_the_same(tmp_path: Path, scope: str) -> None:
    model = gated(scope=scope)
    base = Tiny().eval()
    before = base(x := ids(3, 7))
    gatecc.save(model, tmp_path / "ckpt")
    loaded = gatecc.load(base, tmp_path / "ckpt")
    assert_same(model, loaded, x)
    assert not torch.equal(loaded(x), before)
    assert torch.equal(base(x), before)
    assert type(loaded).__name__ == "Tiny"
    assert history(base) == ()


def test_the_files_and_what_the_recipe_says(model: nn.Module, tmp_path: Path) -> None:
    gatecc.save(model, str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.json", "model.safetensors", "example.safetensors"}
    data = json.loads((tmp_path / "recipe.json").read_text())
    assert data["format"] == 2
    assert data["aliases"] == {"head.weight": "embed.weight"} == data["tied"]
    (step,) = data["steps"]
    assert step["recipe"] == ATTENTION
    assert "Gated Attention" in step["citation"]
    assert step["rewrites"][0]["rewrite"] == "gate"
    assert [s.split("#")[0] for s in step["sites"]] == ["attend.0", "attend.1"]
    assert data["new"]["attend.1.gate.weight"] == ["float32", [2, 16]]
    assert "attend.1.gate.weight" not in data["base"]
    assert str(tmp_path) not in (tmp_path / "recipe.json").read_text()


def test_transformed_twice_and_trained(tmp_path: Path) -> None:
    model = gatecc.transform(
        gatecc.transform(Tiny(), ATTENTION, (ids(),), verify=False), MLP_GATE, (ids(),), verify=False
    )
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        model(ids()).logsumexp(-1).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    gatecc.save(model, tmp_path)
    loaded = gatecc.load(Tiny(), tmp_path)
    assert loaded.training
    assert [s.recipe.name for s in history(loaded)] == [ATTENTION, "custom"]
    assert_same(model.eval(), loaded.eval(), ids(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), loaded.buffers(), strict=True))
    assert loaded.get_parameter("head.weight") is loaded.get_parameter("embed.weight")


def test_bfloat16_and_folded_weights(tmp_path: Path) -> None:
    recipe = gatecc.recipe(ATTENTION, init="identity(how=fold)")
    model = gatecc.transform(Tiny().to(torch.bfloat16).eval(), recipe, (ids(),), verify=False)
    assert [e.path for e in history(model)[0].effects if e.edits_model]
    perturb(model)
    gatecc.save(model, tmp_path)
    loaded = gatecc.load(Tiny().to(torch.bfloat16).eval(), tmp_path)
    assert_same(model, loaded, ids(3, 7))
    plain = gatecc.revert(model)
    assert_same(plain, gatecc.revert(loaded), ids(3, 7))


class Separate(nn.Module):
    """Self-attention with a projection of its own for the queries."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), *self.kv(x).chunk(2, -1)))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_widened_weights(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    model = gatecc.transform(Separate().eval(), gatecc.recipe(ATTENTION, fuse_into="q"), (x,), verify=False)
    assert [e.path for e in history(model)[0].effects if e.edits_model]
    perturb(model)
    gatecc.save(model, tmp_path)
    loaded = gatecc.load(base := Separate().eval(), tmp_path)
    assert_same(model, loaded, x)
    assert loaded.get_parameter("q.weight").shape == (18, 16)
    assert base.q.weight.shape == (16, 16)
    assert_same(gatecc.revert(model), gatecc.revert(loaded), x)


def test_nested_example_inputs(tmp_path: Path) -> None:
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    model = gatecc.transform(
        Tiny().eval(), ATTENTION, ((ids(),), {"options": {"mask": mask, "rate": 0.1, "none": None}})
    )
    perturb(model)
    gatecc.save(model, tmp_path)
    loaded = gatecc.load(Tiny().eval(), tmp_path)
    _, kwargs = history(loaded)[0].inputs
    assert torch.equal(kwargs["options"].pop("mask"), mask)
    assert kwargs == {"options": {"rate": 0.1, "none": None}}
    options = {"mask": mask, "rate": 0.1, "none": None}
    assert torch.equal(model(x := ids(), options), loaded(x, options))


def test_buffers_that_are_views_of_each_other(tmp_path: Path) -> None:
    base, table = Tiny().eval(), torch.arange(6.0)
    base.register_buffer("table", table)
    base.register_buffer("rows", table.view(2, 3))
    saved = gatecc.transform(base, ATTENTION, (ids(),), verify=False)
    gatecc.save(saved, tmp_path)
    assert_same(saved, gatecc.load(base, tmp_path), ids())


def test_inplace_keeps_the_model_object(model: nn.Module, checkpoint: Path) -> None:
    base = Tiny().eval()
    embedding = base.embed.weight
    assert gatecc.load(base, checkpoint, inplace=True) is base
    assert base.embed.weight is embedding
    assert_same(model, base, ids())


def test_ties_of_the_saved_model_are_made(model: nn.Module, checkpoint: Path) -> None:
    loaded = gatecc.load(Tiny(tied=False).eval(), checkpoint)
    assert loaded.get_parameter("head.weight") is loaded.get_parameter("embed.weight")
    assert_same(model, loaded, ids())


def test_loading_leaves_the_random_state_alone(checkpoint: Path) -> None:
    base = Tiny().eval()
    state = torch.get_rng_state()
    gatecc.load(base, checkpoint)
    assert torch.equal(state, torch.get_rng_state())


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG_BASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "wider": (lambda: Tiny(width=32), ("embed.weight", "float32 (11, 32)", "float32 (11, 16)", "more")),
    "another dtype": (lambda: Tiny().double(), ("embed.weight", "float64 (11, 16)", "float32 (11, 16)")),
    "fewer layers": (lambda: Tiny(layers=1), ("attend.1.qkv.weight", "missing")),
    "more layers": (lambda: Tiny(layers=3), ("attend.2.qkv.weight", "missing")),
    "another class": (lambda: FeedForward(), ("FeedForward", "Tiny")),
    "transformed already": (lambda: gated(layers=1), ("transformed already", "revert")),
}


@pytest.mark.parametrize(("make", "told"), WRONG_BASES.values(), ids=WRONG_BASES)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_wrong_base_model(
    checkpoint: Path, make: Callable[[], nn.Module], told: tuple[str, ...], inplace: bool
) -> None:
    base = make()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        gatecc.load(base, checkpoint, inplace=inplace)
    for text in told:
        assert text in str(caught.value)
    assert list(base.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())


def test_weights_tied_in_the_base_but_not_in_the_checkpoint(tmp_path: Path) -> None:
    gatecc.save(gated(tied=False), tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)ties weights.*head\.weight is embed\.weight"):
        gatecc.load(Tiny(), tmp_path)


def test_a_failed_second_step_undoes_the_first(copied: Path) -> None:
    def add_step(data: dict[str, Any]) -> None:
        second = json.loads(json.dumps(data["steps"][0]))
        second["recipe"] = "second"
        second["rewrites"][0]["site"]["where"] = "elsewhere.*"
        data["steps"].append(second)

    edit(copied, add_step)
    base = Tiny().eval()
    expected = base(x := ids())
    with pytest.raises(CheckpointError, match=r"(?s)second.*elsewhere"):
        gatecc.load(base, copied, inplace=True)
    assert torch.equal(base(x), expected)
    assert list(base.state_dict()) == list(Tiny().state_dict())
    assert type(base.attend[0]) is Attend


def test_a_replay_that_does_something_else(copied: Path) -> None:
    edit(copied, lambda data: data["steps"][0]["rewrites"][0]["site"].update(where="attend.0"))
    with pytest.raises(CheckpointError, match=r"sites: attend\.1#0.*something else"):
        gatecc.load(Tiny(), copied)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "recipe.json").read_text())
    change(data)
    (folder / "recipe.json").write_text(json.dumps(data))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda f: (f / "recipe.json").unlink(), "no checkpoint in this folder"),
    "half a head": (lambda f: os.truncate(f / "recipe.json", 200), "cannot be read"),
    "a list": (lambda f: (f / "recipe.json").write_text("[]"), "no JSON object"),
    "later format": (lambda f: edit(f, lambda d: d.update(format=99)), "format 99"),
    "no steps": (lambda f: edit(f, lambda d: d.pop("steps")), "damaged"),
    "unknown rewrite": (lambda f: edit(f, lambda d: d["steps"][0]["rewrites"][0].update(rewrite="gone")), "import"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 1000), "damaged"),
    "one bit": (lambda f: flip(f / "model.safetensors"), "damaged"),
    "foreign file": (
        lambda f: edit(f, lambda d: d["files"]["model"].update(name="../x.safetensors")),
        "none of its own",
    ),
    "recipe of another": (lambda f: edit(f, lambda d: d["base"].pop("norm.bias")), "not those that the recipe lists"),
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder(copied: Path, damage: Callable[[Path], object], told: str) -> None:
    damage(copied)
    with pytest.raises(CheckpointError, match=told):
        gatecc.load(Tiny(), copied)


def test_an_untransformed_model_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not transformed"):
        gatecc.save(Tiny(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_predicate_cannot_be_saved(tmp_path: Path) -> None:
    rewrite = gatecc.Gate(
        gatecc.Attention[lambda s: True].heads, gatecc.GateSpec("hidden", "linear", "head", "sigmoid")
    )
    model = gatecc.transform(Tiny(), rewrite, (ids(),), verify=False)
    with pytest.raises(ArgumentError, match="Python function"):
        gatecc.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
