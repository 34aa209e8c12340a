"""A transform without weights decides what one with them decides; weights that come later make it the same model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, CheckpointError, UnsupportedModelError
from gatecc.transform import history

IDS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
RECIPES = ("gated-attention", "upcycle")


def llama() -> nn.Module:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


class Own(nn.Module):
    """Plain layers, with a buffer that is in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * self.scale
        return x


def own() -> nn.Module:
    torch.manual_seed(0)
    return Own().eval()


def empty(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def tables(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that no state dict holds."""
    return {n: b for n, b in model.named_buffers() if n not in model.state_dict()}


def output(model: nn.Module, *args: Any) -> Tensor:
    with torch.no_grad():
        found = model(*args)
    return found if isinstance(found, Tensor) else found.logits


@pytest.fixture(scope="module", params=RECIPES)
def both(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Transformed without weights, and with them."""
    torch.manual_seed(1)
    real = gatecc.transform(llama(), request.param, (IDS,), verify=False)
    return gatecc.transform(empty(llama), request.param, (IDS,), inplace=True, verify=False), real


def test_the_same_decisions_without_weights(both: tuple[nn.Module, nn.Module]) -> None:
    shaped, real = both
    assert all(p.is_meta for p in shaped.parameters())
    assert {n: (t.shape, t.dtype) for n, t in shaped.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in real.state_dict().items()
    }
    mine, right = gatecc.last_report(shaped), gatecc.last_report(real)
    assert [(r.site, r.new_parameters, r.effects) for r in mine.rewrites] == [
        (r.site, r.new_parameters, r.effects) for r in right.rewrites
    ]
    assert mine.totals.parameters_after == right.totals.parameters_after
    assert mine.totals.flops_after == right.totals.flops_after
    assert mine.totals.max_error is None
    assert any("no number was checked" in note for note in mine.notes)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        gatecc.decoder(shaped, (IDS,))


def test_all_weights_at_once(both: tuple[nn.Module, nn.Module]) -> None:
    """Of the rewritten model: no weight that the rewrite took out is missed, but to take the rewrite back."""
    shaped, real = both
    whole = gatecc.transform(empty(llama), gatecc.last_report(shaped).recipe, (IDS,), inplace=True)
    whole.load_state_dict(real.state_dict(), assign=True)
    for name, table in tables(real).items():
        holder, _, leaf = name.rpartition(".")
        whole.get_submodule(holder)._buffers[leaf] = table
    whole.get_submodule("lm_head").register_parameter("weight", whole.get_parameter("model.embed_tokens.weight"))
    assert torch.equal(output(whole, IDS), output(real, IDS))
    assert torch.equal(output(whole.train(), IDS[:1, :5]), output(real, IDS[:1, :5]))
    if gatecc.last_report(shaped).recipe == "upcycle":
        with pytest.raises(UnsupportedModelError, match=r"(?s)never loaded.*materialise"):
            gatecc.revert(whole)
        with pytest.raises(CheckpointError, match=r"(?s)gate_proj.*holds nothing"):
            gatecc.save(whole, "nowhere")


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_shard_by_shard(recipe: str, tmp_path: Path) -> None:
    """From a folder of the library; new modules are then filled from them, and the contract is checked."""
    llama().save_pretrained(tmp_path, max_shard_size="8KB")  # pyright: ignore[reportCallIssue]
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    shaped = gatecc.transform(empty(llama), recipe, (IDS,), inplace=True, verify=False)
    torch.manual_seed(3)
    made = gatecc.materialise(shaped, [tables(llama()), tmp_path])
    assert made is shaped
    torch.manual_seed(3)
    right = gatecc.transform(llama(), recipe, (IDS,), verify=False)
    assert made.state_dict().keys() == right.state_dict().keys()
    assert all(torch.equal(t, right.state_dict()[n]) for n, t in made.state_dict().items())
    assert made.get_parameter("lm_head.weight") is made.get_parameter("model.embed_tokens.weight")
    assert torch.equal(output(made, IDS), output(right, IDS))
    report = gatecc.last_report(made)
    assert report.totals.contract_held
    assert not any("no number" in note for note in report.notes)
    assert torch.equal(output(gatecc.revert(made), IDS), output(llama(), IDS))


def test_a_model_of_ones_own_in_two_transforms(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    shaped = empty(own)
    for recipe in ("upcycle", [gatecc.Gate(gatecc.Residual[...].branch, gatecc.GateSpec("param", "none"))]):
        shaped = gatecc.transform(shaped, recipe, (x,), verify=False)
    save_file(own().to(torch.float64).state_dict(), tmp_path / "weights.safetensors")
    made = gatecc.materialise(shaped, tmp_path / "weights.safetensors")
    assert len(history(made)) == 2
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert torch.allclose(output(made, x), output(own(), x), atol=1e-6)


def test_what_is_refused(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 16)
    state = own().state_dict()

    def shaped() -> nn.Module:
        return gatecc.transform(empty(own), "upcycle", (x,), inplace=True)

    with pytest.raises(CheckpointError, match=r"(?s)layers\.0\.2\.bias.*1 of the model's are missing"):
        gatecc.materialise(shaped(), {n: t for n, t in state.items() if n != "layers.0.2.bias"})
    with pytest.raises(CheckpointError, match=r"(?s)head.*1 are of no part"):
        gatecc.materialise(shaped(), {**state, "head": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"(?s)layers\.0\.0\.weight.*\(3, 3\).*\(32, 16\)"):
        gatecc.materialise(shaped(), {**state, "layers.0.0.weight": torch.ones(3, 3)})
    with pytest.raises(CheckpointError, match="no weights"):
        gatecc.materialise(shaped(), tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)inv_freq.*init_empty_weights"):
        gatecc.materialise(gatecc.transform(empty(llama), "upcycle", (IDS,)), llama().state_dict())
    with pytest.raises(ArgumentError, match="with weights"):
        gatecc.materialise(gatecc.transform(own(), "upcycle", (x,)), state)
    with pytest.raises(ArgumentError, match="not transformed"):
        gatecc.materialise(empty(own), state)
    without = gatecc.transform(empty(own), "upcycle", (x.to("meta"),))
    with pytest.raises(ArgumentError, match="no values"):
        gatecc.materialise(without, state)
    assert torch.allclose(output(gatecc.materialise(without, state, (x,)), x), output(own(), x), atol=1e-6)
