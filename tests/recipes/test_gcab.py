"""Gated class-attention: masks by hand, what training leaves alone, what is skipped, and what is refused."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.passes.task_mask import TaskMask, TaskMasks
from gatecc.recipes.samples import weighted
from gatecc.train import FeatureDrift, task_training
from tests.recipes.checks import randomise, reverted

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
TASK = torch.tensor([0, 1, 1, 2])


class Tasks(nn.Module):
    """A classifier of images that is told the task of each."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        found = self.net(x)
        return found if isinstance(found, Tensor) else found.logits


@cache
def plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    if name == "cait":
        return weighted(Tasks(timm.create_model("cait_xxs24_224", patch_size=8, **sizes)))
    if name == "xcit":
        return weighted(Tasks(timm.create_model("xcit_nano_12_p8_224", cls_attn_layers=1, **sizes)))
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}
    config = transformers.ViTConfig(**shape, intermediate_size=32, image_size=32, patch_size=8)
    return weighted(Tasks(transformers.ViTForImageClassification(config)))


SITES = {"cait": "*token_only*", "xcit": "*cls_attn*", "vit": "-1"}


@cache
def _gated(name: str) -> nn.Module:
    at = SITES[name]
    options = {"attention": f"attention[{at}]", "mlp": f"mlp[{at}]"}
    model = gatecc.transform(plain(name), gatecc.recipe("gcab", tasks=3, **options), (X, TASK))
    with torch.no_grad():
        assert torch.equal(model(X, TASK), plain(name)(X, TASK))  # every e is large: all channels are on
    return model


def gated(name: str) -> nn.Module:
    """A copy with masks that have half of the channels off."""
    model = copy.deepcopy(_gated(name))
    for module in masks(model).values():
        randomise(module.parameters(), 4.0)
    return model


def masks(model: nn.Module) -> dict[str, TaskMasks]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TaskMasks)}


def test_class_attention_by_hand() -> None:
    model, s = gated("cait"), 0.3
    net: Any = copy.deepcopy(plain("cait")).net
    for name, module in masks(model).items():
        module.slope.fill_(s)
        module.current.fill_(1)
        owner: Any = net.get_submodule(name.removeprefix("net.").removesuffix(".task_masks"))
        e: Any = {n: p.detach()[TASK] for n, p in module.named_parameters()}
        m = {n: torch.where(TASK[:, None] == 1, torch.sigmoid(s * v), (v > 0).float()) for n, v in e.items()}

        def attention(u: Tensor, a: Any = owner, m: Any = m) -> Tensor:
            q = m["q"] * a.q(m["hidden"] * u[:, 0])
            k = m["k"][:, None] * a.k(m["hidden_kv"][:, None] * u)
            v = a.v(m["hidden_kv"][:, None] * u)
            q, k, v = (t.unflatten(-1, (2, 8)) for t in (q, k, v))
            weights = torch.softmax(torch.einsum("bhd,bnhd->bhn", q, k) * 8**-0.5, -1)
            heads = torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)
            return (m["out"] * a.proj(m["heads"] * heads)).unsqueeze(1)

        def mlp(x: Tensor, a: Any = owner, m: Any = m) -> Tensor:
            return m["out"][:, None] * a.fc2(m["hidden"][:, None] * a.act(a.fc1(x)))

        owner.forward = mlp if name.endswith("mlp.task_masks") else attention
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.allclose(model(X, TASK), net.train()(X), atol=1e-5)


@pytest.mark.parametrize("name", SITES)
def test_what_is_off_is_skipped(name: str) -> None:
    model = gated(name)
    masked_form = model(X, TASK).detach()
    with torch.no_grad():
        skipped = model(X, TASK)
        alone = torch.cat([model(x[None], t[None]) for x, t in zip(X, TASK, strict=True)])
    assert torch.allclose(masked_form, skipped, atol=1e-5)
    assert torch.allclose(masked_form, alone, atol=1e-5)
    assert not torch.allclose(masked_form, plain(name)(X, TASK), atol=1e-2)
    found = gatecc.cost(model, (X[1:3], TASK[1:3]), rounds=0)
    expected, tokens = 0, 17
    for path, module in masks(model).items():
        on = {n: module.hard(n)[1].sum().item() for n in module.names}
        size = {n: module.get_parameter(n).size(1) for n in module.names}
        for guard in module.guards:
            one = name != "vit" and (path.endswith("mlp.task_masks") or guard.outputs in ("q", "out"))
            pair = (guard.inputs or "out", guard.outputs)
            live = size[pair[0]] if not guard.inputs else on[pair[0]]
            expected += (0 if one else tokens) * 2 * (size[pair[0]] * size[pair[1]] - live * on[pair[1]])
    assert found.full.flops - found.ran.flops == expected > 0  # per sample; of single tokens nothing
    reverted(model, plain(name), (X, TASK))


def test_training_a_task_leaves_the_earlier_one_as_it_was(tmp_path: Any) -> None:
    model = gated("cait").train()
    before = {t: model.eval()(X, torch.full((4,), t)).detach() for t in (0, 1)}
    features = ("net.patch_embed", "net.pos_embed", "net.blocks.", "net.norm", "net.head")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(features))  # "for unchanged features"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.5)
    for p in trained:  # momentum of an earlier task
        p.grad = torch.randn_like(p)
    state = copy.deepcopy(model.state_dict())
    optimizer.step()
    model.load_state_dict(state)
    optimizer.zero_grad()
    with task_training(model.train(), 1, optimizer, steepest=50.0) as told:
        for step in range(4):
            told.anneal(step / 3)
            s = 1 / 50 + (50 - 1 / 50) * step / 3
            free = [(m, n, 1 - m.hard(n)[0]) for m in masks(model).values() for n in m.names]
            taken = sum(float((torch.sigmoid(s * m.get_parameter(n)[1]) * r).sum()) for m, n, r in free)
            assert float(told.loss()) == pytest.approx(taken / sum(float(r.sum()) for *_, r in free), abs=1e-5)
            loss = F.cross_entropy(model(X, torch.full((4,), 1)), torch.arange(4)) + 0.1 * told.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    weight, old = (m["net.blocks_token_only.0.attn.k.weight"] for m in (model.state_dict(), state))
    used = masks(model)["net.blocks_token_only.0.attn.task_masks"]
    guarded = torch.minimum(used.hard("k")[0][:, None], used.hard("hidden_kv")[0]).bool()
    assert torch.equal(weight[guarded], old[guarded])
    assert bool((weight != old)[~guarded].all())
    after = {t: model.eval()(X, torch.full((4,), t)) for t in (0, 1)}
    assert torch.equal(after[0], before[0])
    assert not torch.allclose(after[1], before[1], atol=1e-2)
    optimizer.step()  # outside nothing is guarded
    assert not torch.equal(model.get_parameter("net.blocks_token_only.0.attn.k.weight")[guarded], old[guarded])
    gatecc.save(model, tmp_path)
    again = gatecc.load(copy.deepcopy(plain("cait")), tmp_path)
    assert torch.equal(again(X, TASK), model(X, TASK))
    assert next(iter(masks(again).values())).guards == next(iter(masks(model).values())).guards


def test_drift_is_the_distance_of_projected_features() -> None:
    drift, f, old = FeatureDrift(3), torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    assert torch.allclose(drift(f, old), (f - old).square().sum(-1).sqrt().mean())  # the projection starts as 1
    randomise(drift.parameters())
    projected = f @ drift.projection.weight.T + drift.projection.bias
    drift(f, old).backward()
    assert torch.allclose(drift(f, old), (projected - old).norm(dim=-1).mean())
    assert old.grad is None
    assert f.grad is not None


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 1 << 12), st.sampled_from([(5,), (0,), (40,), (3, 4), (0, 4), (9, 13), (2, 9, 2)]), st.integers(1, 3)
)
def test_the_operator_is_the_masked_product(seed: int, sizes: tuple[int, ...], tasks: int) -> None:
    torch.manual_seed(seed)
    x, weight, bias = torch.randn(*sizes, 6), torch.randn(7, 6), torch.randn(7)
    inputs, outputs = ((torch.rand(tasks, c) > 0.5) * torch.rand(tasks, c) for c in (6, 7))
    inputs[-1], outputs[-1] = inputs[-1] * (seed % 2), outputs[-1] * (seed % 3 > 0)  # nothing may be on
    task = torch.randint(0, tasks, (sizes[0],))
    for a, b in ((inputs[task], outputs[task]), (None, outputs[:1]), (inputs[:1], None), (inputs[:1], outputs[task])):
        found = torch.ops.gatecc.masked_linear(x, weight, bias, a, b)
        rows = [weight.double() @ v.double() + bias for v in (x if a is None else x * _beside(a, x)).reshape(-1, 6)]
        expected = torch.stack(rows).view(*sizes, 7) if rows else x.new_zeros(*sizes, 7).double()
        expected = expected if b is None else expected * _beside(b, expected)
        assert torch.allclose(found.double(), expected, atol=1e-5)
        learns = weight.clone().requires_grad_()
        assert torch.allclose(torch.ops.gatecc.masked_linear(x, learns, bias, a, b), found, atol=1e-5)
        low = [t if t is None else t.bfloat16() for t in (x, weight, bias, a, b)]
        assert torch.ops.gatecc.masked_linear(*low).dtype == torch.bfloat16


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(mask.size(0), *[1] * (x.dim() - 2), mask.size(1))


def test_bad_input_is_refused() -> None:
    given = (torch.randn(2, 3, 6), torch.randn(7, 6), torch.randn(7), torch.tensor([[0.0] * 6, [0.5] * 6]), None)
    torch.library.opcheck(torch.ops.gatecc.masked_linear.default, given)
    vit: Any = plain("vit")
    sgd = torch.optim.SGD(plain("cait").parameters(), 0.1)
    for model, task in ((_gated("vit"), 3), (_gated("vit"), -1), (plain("cait"), 0)):
        with pytest.raises(ArgumentError, match="no such task"), task_training(model, task, sgd):
            pass
    with pytest.raises(ArgumentError, match="masks are for tasks"):
        gatecc.recipe("gcab", tasks=0)
    with pytest.raises(ArgumentError, match="no masks"):
        TaskMask(gatecc.Linear[...].out, 2)
    with pytest.raises(IndexError):
        _gated("vit")(X, torch.tensor([0, 1, 1, 3]))
    with pytest.raises(SiteRefusedError, match="no input 'task'"):
        gatecc.transform(vit.net, gatecc.recipe("gcab", tasks=2), (X,))
    with pytest.raises(ArgumentError, match="number per sample"):
        torch.ops.gatecc.masked_linear(torch.randn(4, 2, 6), torch.randn(7, 6), None, torch.ones(3, 6))
