"""acts: a scope that some mode goes past is found, and a parent takes its place; what merely rests is not blamed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import gatecc
from gatecc.engine import place
from gatecc.engine.modes import EVAL, EVAL_NO_GRAD, TRAIN_NO_GRAD, acts, holding
from gatecc.errors import CallNotCapturedError, ContractError
from gatecc.ir.weights import NewModule, effect
from tests.recipes.tiny import tiny

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
GATE = gatecc.Gate(gatecc.Linear["blocks.*.a"].out, gatecc.GateSpec("self"))


class Block(nn.Module):
    """Reads the weights of ``a`` past its forward when ``past`` says so."""

    def __init__(self, past: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.past = past

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.a.weight, self.a.bias) if self.past(self) else self.a(x)
        return self.b(torch.relu(h))


class Net(nn.Module):
    def __init__(self, *past: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(p) for p in past)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Drops(Net):
    """Layers that rest in most calls of train mode, as LayerDrop lets them."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.9:
                x = x + block(x)
        return x


def never(_: nn.Module) -> bool:
    return False


def trains_blind(module: nn.Module) -> bool:
    return module.training and not torch.is_grad_enabled()


def trains(module: nn.Module) -> bool:
    return module.training


def scopes(model: nn.Module) -> list[str]:
    return [row.scope for row in gatecc.last_report(model).rewrites]


def noisy(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".gate" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    return model


def test_a_scope_that_a_mode_goes_past_gives_way_to_its_parent(tmp_path: Path) -> None:
    """The second block alone is at fault; the first, whose gates act, must not hide it."""
    gated = gatecc.transform(Net(never, trains_blind).eval(), GATE, (X,))
    assert scopes(gated) == ["blocks.0.a", "blocks.1"]
    (note,) = [n for n in gatecc.last_report(gated).notes if "parent" in n]
    assert note.startswith("blocks.1.a: rewritten in the graph of a parent; alone: in train mode without gradients")
    noisy(gated)
    expected = gated(X)
    for training in (False, True):
        with torch.no_grad():
            assert torch.allclose(gated.train(training)(X), expected, atol=1e-6)
    gatecc.save(gated, tmp_path)  # which modules were gone past is stored: loading does not look for them again
    loaded = gatecc.load(Net(never, trains_blind), tmp_path)
    assert scopes(loaded) == ["blocks.0.a", "blocks.1"]
    with torch.no_grad():
        assert torch.allclose(loaded.train()(X), expected, atol=1e-6)


def test_a_site_that_another_mode_does_not_have_is_refused_there() -> None:
    """In train mode the product belongs to the block, not to ``a``: its call raises, and the report says so."""
    gated = gatecc.transform(Net(trains).eval(), GATE, (X,))
    assert scopes(gated) == ["blocks.0"]
    assert any("train mode with gradients was not looked at, its calls are refused" in n for n in _notes(gated))
    with pytest.raises(CallNotCapturedError):
        gated.train()(X)


def _notes(model: nn.Module) -> list[str]:
    return gatecc.last_report(model).notes


def test_a_layer_that_rests_is_not_blamed() -> None:
    gated = gatecc.transform(Drops(never, never, never, never).eval(), GATE, (X,))
    assert scopes(gated) == [f"blocks.{i}.a" for i in range(4)]
    assert not _notes(gated)


def test_the_scope_in_a_fused_encoder_moves_up_until_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's switches left on: the layer is called, its attention is not; a padded batch reaches neither."""
    monkeypatch.setattr(place, "fast_paths_off", lambda _: [])
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    for mask, expected in ((None, ["layers.0"]), (padding, [""])):
        encoder = nn.TransformerEncoder(layer, 1).eval()
        gated = gatecc.transform(encoder, "gated-attention", {"src": X, "src_key_padding_mask": mask})
        assert scopes(gated) == expected


def test_a_scope_that_has_no_parent_is_an_error() -> None:
    class Odd(nn.Module):
        """Not captured as a whole, and goes past its only captured child without gradients."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) == 1234.0:
                return x
            return F.linear(x, self.a.weight, self.a.bias) if trains_blind(self) else self.a(x)

    model = Odd().eval()
    with pytest.raises(ContractError, match="in train mode without gradients, its weights are read") as caught:
        gatecc.transform(model, gatecc.Gate(gatecc.Linear["a"].out, gatecc.GateSpec("self")), (X,))
    assert caught.value.where == "a"
    assert set(dict(model.named_parameters())) == {"a.weight", "a.bias"}


def test_modes_that_differ_by_one_scope_are_told_apart_from_rounding() -> None:
    """A parent that calls its child and throws half of it away: each scope was called, and the outputs tell."""

    class Halves(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return h if torch.is_grad_enabled() else (h + F.linear(x, self.a.weight, self.a.bias)) / 2

    model = Net(never, never)
    model.blocks[1] = Halves(never)
    gated = gatecc.transform(model.eval(), GATE, (X,))
    assert scopes(gated) == ["blocks.0.a", "blocks.1"]
    assert any("blocks.1.a" in n and "outputs differ by" in n for n in _notes(gated))


@pytest.mark.parametrize("recipe", ["gated-attention", gatecc.recipe("gated-attention", fuse_into="q")], ids=str)
def test_one_capture_serves_all_layers_and_both_grad_modes(
    recipe: str | gatecc.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of train mode; eval mode runs what was installed. With a configuration object, and with weights that grew."""
    learn = importlib.import_module("gatecc.scope.learn")
    made: list[Any] = []

    def counted(*args: Any, _build: Any = learn.build, **kwargs: Any) -> Any:
        made.append(args[0])
        return _build(*args, **kwargs)

    monkeypatch.setattr(learn, "build", counted)
    config = hf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 97, (2, 8))
    gated = gatecc.transform(model, recipe, {"input_ids": ids, "use_cache": False})
    assert [m.training for m in made] == [False]  # it was in train mode meanwhile
    for training in (False, True):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                gated.train(training)(input_ids=ids, use_cache=False)
    assert len(made) == 1


def test_everything_is_as_before_the_look() -> None:
    """Parameters bitwise and the same objects, modes, buffers, random state, no watch left behind."""
    x = torch.randn(2, 7, 16)
    gated = gatecc.transform(tiny(layers=2), "gated-attention", (x,), verify=False)
    gated.register_buffer("calls", torch.zeros(()))
    before = {name: (p, p.data_ptr(), p.clone(), p._version) for name, p in gated.named_parameters()}
    random = torch.get_rng_state()
    new = [NewModule(f"blocks.{i}.attn.gate") for i in range(2)]
    found = acts(gated, scopes(gated), new, ((x,), {}))
    assert not found.missed
    assert not found.notes
    assert found.seconds["capture"] > 0  # train mode, once for both layers
    assert torch.equal(random, torch.get_rng_state())
    for name, p in gated.named_parameters():
        was, pointer, value, version = before[name]
        assert p is was
        assert (p.data_ptr(), p._version) == (pointer, version)
        assert torch.equal(p, value)
        assert p.grad is None
    assert not any(m.training for m in gated.modules())
    assert not any("_compiled_call_impl" in vars(m) for m in gated.modules())


def test_large_parameters_get_noise_in_a_part_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second copy of them is made; every row has some of it, of the size that noise everywhere would have."""
    monkeypatch.setattr(effect, "SPREAD", 1 << 10)
    weight = nn.Parameter(torch.randn(64, 256))
    before = weight.clone()
    x = torch.randn(256)
    held = effect.noise(weight, torch.Generator().manual_seed(0))
    assert held.value.numel() < 2 << 10
    with holding({weight: held}):
        assert bool((weight != before).any(1).all())
        moved = (weight - before) @ x
        assert 0.3 < float(moved.norm() / (64**0.5)) < 3
    assert torch.equal(weight, before)


def test_a_mode_that_the_model_does_not_have_is_noted() -> None:
    class Picky(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise RuntimeError("targets, please")
            return super().forward(x)

    gated = gatecc.transform(Picky(never).eval(), GATE, (X,))
    note = "train mode with gradients was not looked at: the model does not run there: RuntimeError: targets, please"
    assert note in _notes(gated)


def test_noise_that_no_output_shows_is_noted() -> None:
    class Shut(Net):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.0 * super().forward(x)

    gated: Any = gatecc.transform(Shut(never).eval(), GATE, (X,))
    assert "noise on the new parameters is not seen in the outputs for these example inputs" in _notes(gated)


def test_names_of_modes() -> None:
    assert [str(m) for m in (EVAL, EVAL_NO_GRAD, TRAIN_NO_GRAD)] == [
        "eval mode with gradients",
        "eval mode without gradients",
        "train mode without gradients",
    ]
