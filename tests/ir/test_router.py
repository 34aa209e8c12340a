"""Router: a spec as text and JSON, and the module by itself: balancing, figures, padding, steps, casts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc.ops as ops  # registers what a router calls
from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateShape, SourceShape
from gatecc.ir.router import Router, RouterSpec

assert ops
SPECS = [
    RouterSpec(),
    RouterSpec("in", "cosine", "softmax_topk(1)", "zero"),
    RouterSpec(("in", "cond(task)"), choice="noisy_topk(2)", balance="cv2(weight=0.02)"),
    RouterSpec(choice="sigmoid_topk(2, groups=2, limit=1)", balance="aux+z(weight=0.1)+bias", mask="attention_mask"),
    RouterSpec("cond(input_ids)", "hash", "softmax_topk(1)", "zero"),
]


def build(spec: RouterSpec, experts: int = 4, **options: Any) -> Router:
    torch.manual_seed(0)
    return spec.build(GateShape("bnc", {"c": 8}, (SourceShape("bnc", 8),)), experts, **options)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_text_and_json(spec: RouterSpec) -> None:
    assert spec == RouterSpec.parse(str(spec)) == RouterSpec.from_json(spec.to_json())


def test_unknown_options_are_told() -> None:
    with pytest.raises(ArgumentError, match="balance="):
        RouterSpec.parse("in, balence=aux")


def test_losses_are_added_in_training_alone() -> None:
    plain, balanced = build(RouterSpec()), build(RouterSpec(balance="aux(weight=0.5)+z(weight=0.2)"))
    for router in (plain, balanced):
        weights, _ = router(X, X)
        weights.square().sum().backward()
    logits = (X.flatten(0, 1) @ plain.weight.T).float()  # pyright: ignore[reportOperatorIssue]
    share = torch.zeros(10, 4).scatter(1, logits.topk(2).indices, 1.0).mean(0) / 2
    aux = 0.5 * 4 * (share * torch.softmax(logits, -1).mean(0)).sum()
    z = 0.2 * logits.logsumexp(-1).square().mean()
    weight: Any = plain.weight
    (added,) = torch.autograd.grad(aux + z, weight)
    gradient: Any = balanced.weight
    torch.testing.assert_close(gradient.grad, weight.grad + added)
    torch.testing.assert_close(balanced.get_buffer("loss_aux"), torch.stack([aux * 0, aux * 0 + 1, aux]).detach())
    torch.testing.assert_close(balanced.get_buffer("loss_z")[2], z.detach())
    balanced.eval()(X, X)
    assert balanced.get_buffer("loss_aux")[1] == 1
    assert "gatecc" not in str(torch.export.export(balanced, (X, X)).graph)


def test_the_scale_of_losses() -> None:
    grads: list[Tensor] = []
    for scale in (1.0, 0.25):
        router = build(RouterSpec(balance="z"))
        router.get_buffer("loss_scale").fill_(scale)
        (router(X, X).weights * 0).sum().backward()
        weight: Any = router.weight
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0] * 0.25, grads[1])


def test_figures_add_up_over_a_step() -> None:
    router = build(RouterSpec(balance="capacity(factor=1.0)"))
    chosen = router(X, X)
    router(X, X)
    routed = router.get_buffer("routed")
    assert routed[:3].tolist() == [0, 2, 20]
    assert torch.equal(router.counts, 2 * torch.bincount(chosen.indices.flatten(), minlength=5)[:4].float())
    assert routed[4] == 2 * (chosen.indices == 4).sum() > 0
    router.advance()
    assert routed[1] == 2
    router(X, X)
    assert routed[:3].tolist() == [1, 1, 10]


def test_padding_counts_nowhere() -> None:
    spec = RouterSpec(balance="aux+z+capacity(factor=1.0)", mask="attention_mask")
    short, padded = build(spec), build(spec)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
    x = X.clone()
    x[:, 3:] = 99.0
    one, other = short(X[:, :3], X[:, :3], torch.ones(2, 3)), padded(x, x, mask)
    assert torch.equal(one.indices, other.indices.view(2, 5, -1)[:, :3].flatten(0, 1))
    assert (other.indices.view(2, 5, -1)[:, 3:] == 4).all()
    for name in ("routed", "loss_aux", "loss_z"):
        torch.testing.assert_close(short.get_buffer(name), padded.get_buffer(name))


def test_the_bias_of_loss_free_balancing() -> None:
    router = build(RouterSpec(choice="sigmoid_topk(1)", balance="bias(rate=0.5)"))
    for _ in range(2):  # two passes of one step
        router(X, X)
    counts = router.counts.clone()
    router.advance()
    expected = 0.5 * torch.sign(counts.mean() - counts)
    assert torch.equal(router.get_buffer("expert_bias"), expected)
    assert expected.abs().sum() > 0
    assert "expert_bias" in router.state_dict()
    assert "routed" not in router.state_dict()


def test_a_schedule_goes_on_where_a_checkpoint_ends() -> None:
    spec = RouterSpec(choice="softmax_topk(2, T=linear(2.0, 1.0, 10))")
    router, resumed = build(spec), build(spec)
    for _ in range(4):
        router.advance()
    resumed.load_state_dict(router.state_dict())
    resumed.advance()
    assert float(resumed.get_buffer("temperature")) == pytest.approx(1.5)


def test_casts_leave_counts_and_biases_alone() -> None:
    router = build(RouterSpec(choice="sigmoid_topk(2)", balance="bias"))
    router.get_buffer("expert_bias").fill_(1.001)
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert {b.dtype for b in router.buffers()} == {torch.float32}
    assert router.get_buffer("expert_bias")[0] == torch.tensor(1.001)
    assert router(X.bfloat16(), X.bfloat16()).weights.dtype == torch.float32
    meta = build(RouterSpec(balance="aux"), device="meta").to_empty(device="cpu")
    assert meta.get_buffer("loss_aux").device.type == "cpu"


def test_a_learned_temperature_is_a_parameter() -> None:
    router = build(RouterSpec(choice="softmax_topk(2, T=2.0, learned=True)"))
    assert [n for n, _ in router.named_parameters()] == ["weight", "log_temperature"]
    router(X, X).weights[:, 0].sum().backward()
    assert router.get_parameter("log_temperature").grad is not None
    assert any("1 / log(n)" in note for note in router.router.notes)


def test_notes_say_what_needs_the_callback() -> None:
    assert not RouterSpec(balance="aux").notes
    for spec in (RouterSpec(balance="bias"), RouterSpec(choice="sinkhorn_topk(k=2, p=0.5)")):
        assert any("once per step" in note for note in spec.notes)


def test_noise_has_rows_of_its_own() -> None:
    router = build(RouterSpec(choice="noisy_topk(2)", balance="cv2"))
    assert tuple(router.get_parameter("weight").shape) == (8, 8)
    router(X, X).weights.sum().backward()
    grad = router.get_parameter("weight").grad
    assert grad is not None
    assert (grad[4:].abs().sum(1) > 0).all()


def test_no_token_at_all() -> None:
    router = build(RouterSpec(balance="aux+z+capacity", choice="softmax_topk(2)"))
    weights, indices = router(X[:0], X[:0])
    weights.sum().backward()
    assert weights.shape == indices.shape == (0, 2)
    grad = router.get_parameter("weight").grad
    assert grad is not None
    assert (grad == 0).all()


def test_copies_and_pickles() -> None:
    router = build(RouterSpec(balance="aux+bias"))
    router(X, X)
    for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert torch.equal(other.get_buffer("routed"), router.get_buffer("routed"))
        assert torch.equal(other.logits(X, X), router.logits(X, X))
