"""Masks handed down: layers of a converted decoder take every call that the model takes, whatever its example was."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gatecc
from gatecc.errors import MaskFormError
from gatecc.ir.mask import Mask
from gatecc.ir.site import Attention, Site
from gatecc.scope.masks import proved_masks
from gatecc.scope.state import scopes
from tests.copies import learning_alone

SHAPE: dict[str, Any] = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(3, 41, (2, 9), generator=torch.Generator().manual_seed(0))
RIGHT, LEFT = torch.ones_like(IDS), torch.ones_like(IDS)
RIGHT[0, 6:] = 0
LEFT[0, :4] = 0
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]])
EXAMPLES = {"plain": {"input_ids": IDS}, "padded": {"input_ids": IDS, "attention_mask": RIGHT}}


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, intermediate_size=24, use_cache=False, **options)
    return LlamaForCausalLM(config).eval()


def convert(
    model: nn.Module, recipe: str, example: dict[str, Tensor], verify: bool = False, **options: Any
) -> nn.Module:
    student = gatecc.transform(model, gatecc.recipe(recipe, **options), example, verify=verify)
    known = {name for name, _ in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in student.named_parameters():
            if name not in known:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return student


@cache
def of_example(name: str) -> nn.Module:
    return convert(llama(), "gla", EXAMPLES[name], verify=True)


@pytest.fixture(scope="module", params=["plain", "padded"])
def student(request: pytest.FixtureRequest) -> nn.Module:
    return learning_alone(of_example(request.param))


def close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, atol=1e-5))


def logits(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(*args, **kwargs).logits


def four_axes(keep: Tensor) -> Tensor:
    """(B, N) -> (B, 1, N, N), True where a query sees a key."""
    n = keep.size(1)
    return (keep[:, None, :].bool() & torch.ones(n, n, dtype=torch.bool).tril())[:, None]


def test_the_layers_are_the_scopes(student: nn.Module) -> None:
    assert [fqn for fqn, _, _ in scopes(student)] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize("form", ["2-D", "bool", "added", "full"])
def test_padding_on_the_right_hides_nothing_else(student: nn.Module, form: str) -> None:
    low = torch.finfo(torch.float32).min
    mask: Any = {
        "2-D": RIGHT,
        "bool": four_axes(RIGHT),
        "added": torch.zeros(2, 1, 9, 9).masked_fill(~four_axes(RIGHT), low),
        "full": RIGHT.bool(),
    }[form]
    assert close(logits(student, IDS, attention_mask=mask)[0, :6], logits(student, IDS[:1, :6])[0])


def test_padding_on_the_left_hides_nothing_else(student: nn.Module) -> None:
    positions = (LEFT.cumsum(1) - 1).clamp_min(0)
    padded = logits(student, IDS, attention_mask=LEFT, position_ids=positions)
    assert close(padded[0, 4:], logits(student, IDS[:1, 4:])[0])


def test_no_padding_is_no_mask(student: nn.Module) -> None:
    assert close(logits(student, IDS, attention_mask=torch.ones_like(IDS)), logits(student, IDS))
    assert close(logits(student, IDS, attention_mask=four_axes(torch.ones_like(IDS))), logits(student, IDS))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_what_is_true_of_the_longer_call_is_true_of_the_shorter(student: nn.Module, tokens: int) -> None:
    assert close(logits(student, IDS[:, :tokens]), logits(student, IDS)[:, :tokens])
    mask = torch.ones_like(IDS[:1, :tokens])
    assert close(logits(student, IDS[:1, :tokens], attention_mask=mask), logits(student, IDS)[:1, :tokens])


def apart(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return torch.cat([logits(model, part) for part in ids.split([3, 4, 2], 1)], 1)


def test_packed_rows_are_separate_runs(student: nn.Module) -> None:
    assert close(logits(student, IDS, position_ids=PACKED.expand(2, -1)), apart(student))
    at = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    blocks = four_axes(torch.ones_like(IDS)) & (at[:, None] == at)
    assert close(logits(student, IDS, position_ids=PACKED.expand(2, -1), attention_mask=blocks), apart(student))


def _prefix() -> Tensor:
    mask = four_axes(torch.ones_like(IDS))
    mask[..., :3, :3] = True
    return mask


def _sparse() -> Tensor:
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(2)) > 0.5
    return mask | torch.eye(9, dtype=torch.bool)


def _biased() -> Tensor:
    scores = torch.zeros(2, 1, 9, 9).masked_fill(~four_axes(RIGHT), -torch.inf)
    scores[1, 0, 5, 2] = -1.0
    return scores


@pytest.mark.parametrize("mask", [_prefix(), _sparse(), _biased()], ids=["prefix", "sparse", "biased"])
@pytest.mark.parametrize("grad", [True, False])
def test_another_mask_is_never_ignored(student: nn.Module, mask: Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(MaskFormError, match="another form"):
        student(IDS, attention_mask=mask)


def test_gradients_of_packed_rows_are_those_of_separate_runs(student: nn.Module) -> None:
    weights = [p for p in student.parameters() if p.requires_grad]
    student.train()
    together = student(IDS, position_ids=PACKED.expand(2, -1)).logits.square().sum()
    alone = torch.stack([student(part).logits.square().sum() for part in IDS.split([3, 4, 2], 1)]).sum()
    pairs = zip(*(torch.autograd.grad(loss, weights, allow_unused=True) for loss in (together, alone)), strict=True)
    student.eval()
    for a, b in pairs:
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_copies_take_padded_batches_too(student: nn.Module, tmp_path: Path) -> None:
    want = logits(student, IDS, attention_mask=LEFT)
    copies: list[Callable[[], nn.Module]] = [
        lambda: copy.deepcopy(student),
        lambda: pickle.loads(pickle.dumps(student)),
        lambda: _loaded(student, tmp_path),
    ]
    for make in copies:
        made = make()
        assert torch.equal(logits(made, IDS, attention_mask=LEFT), want)
        with pytest.raises(MaskFormError):
            logits(made, IDS, attention_mask=_prefix())
    back, plain = gatecc.revert(student), llama()
    assert torch.equal(logits(back, IDS, attention_mask=LEFT), logits(plain, IDS, attention_mask=LEFT))
    assert torch.equal(logits(back, IDS, attention_mask=_prefix()), logits(plain, IDS, attention_mask=_prefix()))


def _loaded(student: nn.Module, folder: Path) -> nn.Module:
    gatecc.save(student, folder / "student")
    return gatecc.load(llama(), folder / "student")


def test_compiled_calls_assert_as_well() -> None:
    student = learning_alone(of_example("plain"))
    compiled: Any = torch.compile(student, fullgraph=True, backend="aot_eager")
    assert close(logits(compiled, IDS, attention_mask=LEFT), logits(student, IDS, attention_mask=LEFT))
    assert close(logits(compiled, IDS), logits(student, IDS))
    with pytest.raises(RuntimeError, match="GCC180"):
        logits(compiled, IDS, attention_mask=_prefix())


def test_exported_programs_assert_as_well() -> None:
    student = learning_alone(of_example("plain"))
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": four_axes(LEFT), "use_cache": False}
    with torch.no_grad():
        program = torch.export.export(student, (), inputs, strict=False).module()
        assert close(program(**inputs).logits, logits(student, IDS, attention_mask=LEFT))
        with pytest.raises(RuntimeError, match="GCC180"):
            program(**{**inputs, "attention_mask": _prefix()})
        program = torch.export.export(student, (), {**inputs, "attention_mask": LEFT}, strict=False).module()
        assert close(program(**{**inputs, "attention_mask": LEFT}).logits, logits(student, IDS, attention_mask=LEFT))


def test_checkpointing_runs_padded_layers_again(student: nn.Module) -> None:
    thrifty: Any = copy.deepcopy(student).train()

    def gradients() -> tuple[Tensor | None, ...]:
        loss = thrifty(IDS, attention_mask=RIGHT, labels=IDS).loss
        return torch.autograd.grad(loss, list(thrifty.parameters()), allow_unused=True)

    want = gradients()
    thrifty.gradient_checkpointing_enable()
    for a, b in zip(gradients(), want, strict=True):
        assert a is None if b is None else a is not None and torch.allclose(a, b, atol=1e-6)


def test_half_precision_takes_padded_batches(student: nn.Module) -> None:
    half = copy.deepcopy(student).bfloat16()
    padded = logits(half, IDS, attention_mask=RIGHT)[0, :6].float()
    assert torch.allclose(padded, logits(student, IDS[:1, :6])[0], atol=0.05)


def test_a_window_is_handed_down_with_its_padding() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SHAPE, intermediate_size=24, sliding_window=4, num_key_value_heads=1))
    short = {"input_ids": IDS[:, :3]}  # a call that makes no mask, for the window is wider
    student = convert(model.eval(), "liger", short, window=6)
    assert {state.masks["", 0].window for _, _, state in scopes(student)} == {4}
    assert close(logits(student, IDS, attention_mask=RIGHT)[0, :6], logits(student, IDS[:1, :6])[0])
    assert close(logits(student, IDS, position_ids=PACKED.expand(2, -1)), apart(student))
    with pytest.raises(MaskFormError, match="the last 4"):
        logits(student, IDS, attention_mask=four_axes(RIGHT))


def test_a_mask_beside_a_bias_of_positions() -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=41, hidden_size=16, n_layer=2, n_head=2, use_cache=False)).eval()
    student = convert(model, "gla", EXAMPLES["plain"])
    assert all(fqn for fqn, _, _ in scopes(student))
    assert close(logits(student, IDS, attention_mask=LEFT)[0, 4:], logits(student, IDS[:1, 4:])[0])
    assert close(logits(student, IDS[:1, :1]), logits(student, IDS)[:1, :1])


def test_encoders_take_padded_and_packed_rows() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=41, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_decoder_layers=1, num_heads=2, use_cache=False
    )
    model = T5ForConditionalGeneration(config).eval()
    example = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}
    student = convert(model, "gla", example, sites="attention[*SelfAttention*]")
    short = logits(student, IDS[:1, :6], decoder_input_ids=IDS[:1, :5])[0]
    assert close(logits(student, IDS, attention_mask=RIGHT, decoder_input_ids=IDS[:, :5])[0], short)
    cut = logits(student, IDS, attention_mask=RIGHT, decoder_input_ids=IDS[:, :5], decoder_attention_mask=RIGHT[:, 4:])
    assert close(cut[0, :2], short[:2])


class Stack(nn.Module):
    """Layers of torch, whose attention is given one stream three times: alone it could be attention across two."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
        self.embed, self.encoder = nn.Embedding(41, 16), nn.TransformerEncoder(layer, 2)
        self.causal = causal

    def forward(self, ids: Tensor, keep: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(ids.size(1))
        hidden = None if keep is None else torch.zeros(keep.shape).masked_fill(keep == 0, -torch.inf)
        return self.encoder(self.embed(ids), mask, hidden, self.causal or None)


@pytest.mark.parametrize(("causal", "padded"), [(False, False), (True, True)])
def test_layers_of_torch_are_scopes_by_themselves(causal: bool, padded: bool) -> None:
    student: Any = convert(Stack(causal).eval(), "gla", {"ids": IDS, **({"keep": RIGHT} if padded else {})})
    assert [fqn for fqn, _, _ in scopes(student)] == ["encoder.layers.0", "encoder.layers.1"]
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert close(student(IDS, RIGHT)[0, :6], student(IDS[:1, :6])[0])
            assert close(student(IDS, RIGHT)[1], student(IDS)[1])
            assert close(student(IDS[:1, :1]), student(IDS)[:1, :1]) == causal
    if not causal:
        with pytest.raises(MaskFormError):
            student(IDS, mask=torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(7) > 0, -torch.inf))
    assert torch.equal(gatecc.revert(student).eval()(IDS, RIGHT)[1], Stack(causal).eval()(IDS, RIGHT)[1])


# --- which masks are handed down --------------------------------------------------------------------------------------


def _site(mask: Mask, call: int = 0) -> Site:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    return Attention(
        owner="a.b", call=call, values={}, spelling="sdpa", core=node, heads=1, kv_heads=1, scale=1.0, mask=mask
    )


def test_proved_masks_are_known_by_their_places() -> None:
    assert proved_masks([_site(Mask("packed", padding=True, reason="proved"))], "a") == {("b", 0): Mask("causal")}
    assert proved_masks([_site(Mask("packed", window=3))], "") == {("a.b", 0): Mask("sliding_window", 3)}
    assert proved_masks([_site(Mask("unknown"))], "a") == {}


def test_calls_with_masks_of_two_kinds_prove_nothing() -> None:
    assert proved_masks([_site(Mask("causal")), _site(Mask("bidirectional"), 1)], "a") == {}
