"""ViG and LINA, against scans and convolutions written token by token and cell by cell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.passes.mix.mixers import Lina, Place, ViG
from tests.graphs import attention, done
from tests.recipes.checks import gradients, randomise, reverted
from tests.recipes.replaced import by_hand, gap, heads, merged, shaken, vit

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
PLACE = Place(dim=12, heads=3, kv_heads=3, key=4, value=4, scale=0.5, causal=False, tokens=6)


def _rms(x: Tensor, norm: Any) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight


def _window(x: Tensor, conv: Any, rows: int, columns: int) -> Tensor:
    """x: (B, rows * columns, C), the sum over each cell's neighbours."""
    reach = conv.weight.size(-1) // 2
    outs: list[Tensor] = []
    for r in range(rows):
        for c in range(columns):
            total = torch.zeros_like(x[:, 0]) + (conv.bias if conv.bias is not None else 0.0)
            for i in range(max(r - reach, 0), min(r + reach + 1, rows)):
                for j in range(max(c - reach, 0), min(c + reach + 1, columns)):
                    total = total + x[:, i * columns + j] * conv.weight[:, 0, i - r + reach, j - c + reach]
            outs.append(total)
    return torch.stack(outs, 1)


def _scan(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, order: list[int]) -> Tensor:
    """S <- diag(decay_t) S + k_t v_t^T, o_t = S^T q_t, the tokens in this order."""
    state = torch.zeros(*q.shape[:2], q.size(-1), v.size(-1))
    outs: dict[int, Tensor] = {}
    for t in order:
        state = state * decay[:, :, t, :, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        outs[t] = (state * q[:, :, t, :, None]).sum(-2)
    return torch.stack([outs[t] for t in range(q.size(2))], 2)


def _vig(m: Any, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
    count, tokens = q.size(1), q.size(2)
    decay = torch.sigmoid(x @ m.down.weight.T @ m.up.weight.T + m.up.bias) ** (1 / 16)
    one, other = (heads(d, count) for d in decay.chunk(2, -1))
    q = q * q.size(-1) ** -0.5
    forwards, backwards = list(range(tokens)), list(reversed(range(tokens)))
    wide = _rms((_scan(q, k, v, one, forwards) + _scan(q, k, v, other, backwards)) / 2, m.norm)
    gate = torch.sigmoid(heads(x @ m.gate.weight.T + m.gate.bias, count))
    return gate * wide + (1 - gate) * _rms(heads(x, count), m.local_norm)


def _qkv(old: Any, x: Tensor) -> list[Tensor]:
    return [heads(y, 2) for y in old.qkv(x).chunk(3, -1)]


def _vig_attention(old: Any, x: Tensor, _: Any) -> Tensor:
    patches = F.silu(_window(x[:, 1:], old.local.conv, 4, 4))
    x = torch.cat([x[:, :1], patches], 1)
    return old.proj(merged(_vig(old.mixer, *_qkv(old, x), x=x)))


def _lina(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu() + 1e-6, (k.relu() + 1e-6) * m.kappa
    weights = q @ k.mT
    return weights @ (v * m.nu) / weights.sum(-1, keepdim=True)


def _lina_attention(old: Any, x: Tensor, _: Any) -> Tensor:
    mixed = merged(_lina(old.mixer, *_qkv(old, x)))
    local = _window(x[:, 1:], old.local.conv, 2, 8)
    return old.proj(torch.cat([mixed[:, :1], mixed[:, 1:] + local], 1))


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return vit(global_pool="avg")  # the mean of the patches: a convolution on them alone must be seen


@pytest.mark.parametrize(
    ("name", "options", "attend"),
    [("vig", {}, _vig_attention), ("lina", {"rows": 2, "columns": 8}, _lina_attention)],
)
def test_a_vision_transformer_is_the_equations(plain: nn.Module, name: str, options: Any, attend: Any) -> None:
    model = gatecc.transform(plain, gatecc.recipe(name, prefix=1, **options), (IMAGE,), verify=False)
    new = shaken(model, plain)
    for parameter in (p for n, p in new.items() if "kappa" in n):
        parameter.data.abs_().add_(0.5)  # a sum of weights is divided by
    hand = by_hand(plain, model, ["blocks.0.attn"], attend)
    with torch.no_grad():
        assert gap(model(IMAGE), hand(IMAGE)) <= 1e-5
        assert gap(model(IMAGE[:1]), hand(IMAGE[:1])) <= 1e-5
    gradients(model, new, model(IMAGE))
    reverted(model, plain, (IMAGE,))


def test_vig_reversed_is_vig_with_its_decays_swapped() -> None:
    mixer: Any = ViG(rank=3).module(PLACE)
    randomise(mixer.parameters(), 0.5)
    q, k, v = torch.randn(3, 2, 3, 6, 4)
    x = torch.randn(2, 6, 12)
    straight = mixer(q, k, v, x)
    assert torch.allclose(straight, _vig(mixer, q, k, v, x), atol=1e-5)
    turned = (y.flip(-2) for y in (q, k, v, x))
    with torch.no_grad():
        for p in (mixer.up.weight, mixer.up.bias):
            p.copy_(torch.cat(p.tensor_split(2)[::-1]))
    assert torch.allclose(mixer(*turned).flip(-2), straight, atol=1e-5)
    assert not torch.allclose(mixer(q, k, v, x), straight, atol=1e-3)


def test_lina_at_first_is_ungated_and_does_not_know_its_places() -> None:
    mixer: Any = Lina().module(PLACE)
    q, k, v = torch.randn(3, 2, 3, 6, 4)
    assert {name: bool((p == 1).all()) for name, p in mixer.named_parameters()} == {"kappa": True, "nu": True}
    order = torch.randperm(6)
    assert torch.allclose(mixer(q, k, v)[:, :, order], mixer(*(y[:, :, order] for y in (q, k, v))), atol=1e-5)
    with torch.no_grad():
        mixer.kappa.uniform_(0.5, 2.0)
    assert not torch.allclose(mixer(q, k, v)[:, :, order], mixer(*(y[:, :, order] for y in (q, k, v))), atol=1e-3)
    assert torch.allclose(mixer(q, k, v), _lina(mixer, q, k, v), atol=1e-5)


@pytest.mark.parametrize("name", ["vig", "lina"])
def test_an_identity_start_of_the_convolution(name: str) -> None:
    """It begins as the recipe without one."""
    grid: dict[str, Any] = {"rows": 1, "columns": 3}
    none, first = (gatecc.recipe(name, **o).rewrites for o in ({"conv": 0}, {"start": "identity", **grid}))
    branch = next(r for r in first if r.name == "branch")
    assert str(branch.contract()) == "identity_at_init(1e-06)"
    results: list[Tensor] = []
    for rewrites in (none, first):
        result = done(attention(), *rewrites)
        mixer = result.program.module.get_submodule("att.mixer")
        randomise(mixer.parameters(), 0.3)
        results.append(result.run()[0])
    assert torch.allclose(results[0], results[1], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "causal", "why"),
    [
        ("vig", {"conv": 0}, True, "vig cannot take the place"),
        ("vig", {}, False, "do not fill the grid"),
        ("lina", {}, True, "reads what this mask hides"),
        ("lina", {"rows": 2, "columns": 2}, False, "do not fill the grid"),
    ],
)
def test_other_masks_and_grids_are_refused(name: str, options: Any, causal: bool, why: str) -> None:
    with pytest.raises(SiteRefusedError, match=why):
        done(attention(causal), *gatecc.recipe(name, **options).rewrites)


def test_a_causal_lina_divides_by_what_is_seen() -> None:
    result = done(attention(causal=True), *gatecc.recipe("lina", conv=0).rewrites)
    v, m = result.values, result.program.module.get_submodule("att.mixer")
    randomise(m.parameters(), 0.2)
    with torch.no_grad():
        for p in m.parameters():
            p.add_(1.0)
    q, k = v["qh"].relu() + 1e-6, (v["kh"].relu() + 1e-6) * m.get_parameter("kappa")
    weights = (q @ k.repeat_interleave(2, 1).mT).tril()
    values = (v["vh"] * m.get_parameter("nu")).repeat_interleave(2, 1)
    out = (
        merged(weights @ values / weights.sum(-1, keepdim=True)) @ result.program.module.get_parameter("att.o.weight").T
    )
    assert torch.allclose(result.run()[0], out, atol=1e-5)
