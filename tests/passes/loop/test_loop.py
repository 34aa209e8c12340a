"""The loop rewrite; golden cases in tests/golden/loop show the graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ops.paths import watched
from gatecc.passes.loop import Loop

X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def net(inplace: bool = False) -> Any:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Conv2d(4, 4, 3, padding=1))
    return nn.Sequential(*layers, nn.ReLU(inplace), nn.Flatten(), nn.Linear(144, 5)).eval()


def looped(model: nn.Module, steps: int, *args: Any, site: Any = gatecc.Model[...].out, **options: Any) -> Any:
    return gatecc.transform(model, Loop(site, steps, **options), args or (X,))


def by_hand(model: Any, x: Tensor, steps: int, threshold: float = 1.0, p: Tensor | None = None) -> list[Tensor]:
    """The logits of each step: soft reset, membranes at half of the threshold."""
    first, norm, _, second, _, flat, head = model
    u = v = threshold / 2
    found: list[Tensor] = []
    for t in range(steps):
        u = u + norm(first(x) * (1 if p is None else p[0, t]))
        s = (u >= threshold).to(x.dtype)
        u = u - threshold * s
        v = v + second(s) * (1 if p is None else p[1, t])
        s = (v >= threshold).to(x.dtype)
        v = v - threshold * s
        found.append(head(flat(s)))
    return found


def mean(found: list[Tensor]) -> Tensor:
    """Added up in their order."""
    return sum(found[1:], found[0]) / len(found)


@pytest.mark.parametrize("inplace", [False, True])
def test_neurons_over_steps_with_numbers_per_step(inplace: bool) -> None:
    plain = net(inplace)
    model = looped(plain, 3, carry="spikes", scaled="conv[...].out")
    assert torch.equal(model(X), mean(by_hand(plain, X, 3)))  # p starts at 1
    p = torch.rand(2, 3) + 0.5
    scales = [q for name, q in model.named_parameters() if "steps" in name]
    with torch.no_grad():
        for q, row in zip(scales, p, strict=True):
            q.copy_(row)
    assert torch.allclose(model(X), mean(by_hand(plain, X, 3, p=p)), atol=1e-6)
    model(X).square().sum().backward()
    assert all(q.grad is not None and q.grad.ne(0).any() for q in model.parameters())
    assert torch.equal(gatecc.revert(model)(X), plain(X))


def test_a_neuron_is_that_of_snntorch() -> None:
    snn = pytest.importorskip("snntorch")
    theirs = snn.Leaky(beta=0.9, threshold=0.7, reset_delay=False, spike_grad=snn.surrogate.atan(alpha=2.0))
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    carry = "spikes(threshold=0.7, decay=0.9, start_at=0)"
    model = looped(plain, 4, x, carry=carry, merge="sum")
    other, membrane, total = copy.deepcopy(plain), torch.zeros(5, 4), torch.zeros(5, 2)
    for _ in range(4):
        spikes, membrane = theirs(other[0](x), membrane)
        total = total + other[2](spikes)
    ours = model(x)
    assert torch.allclose(ours, total, atol=1e-6)
    for y in (ours, total):
        y.square().sum().backward()
    for name, p in other.named_parameters():
        assert p.grad is not None
        assert torch.allclose(p.grad, model.get_parameter(name).grad, atol=1e-4), name


class _Stateful(nn.Module):
    """One step of a recurrent net that is given its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return self.head(state), state


def test_outputs_that_are_inputs_of_the_next_step() -> None:
    plain = _Stateful().eval()
    x, state = torch.randn(5, 3), torch.rand(5, 4)
    carry = "states(('state', 'out1'))"
    model = looped(plain, 3, x, state, site=gatecc.Selector.parse("model[...].out0"), carry=carry)
    total, held = torch.zeros(5, 2), state
    for _ in range(3):
        y, held = plain(x, held)
        total = total + y
    assert torch.allclose(model(x, state)[0], total / 3, atol=1e-6)
    with pytest.raises(SiteRefusedError, match="an input of the model that one of its outputs replaces"):
        looped(plain, 3, x, state, site=gatecc.Selector.parse("model[...].out0"), carry="states(('out1', 'state'))")


def test_a_block_again() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), nn.Linear(4, 3))
    x = torch.randn(2, 5, 4)
    model = looped(plain, 3, x, site=gatecc.MLP[...].out, carry="output", merge="last")
    mlp = plain[1]
    assert torch.allclose(model(x), plain[2](mlp(mlp(mlp(plain[0](x))))), atol=1e-6)


def test_one_step_is_the_original_and_none_is_an_error() -> None:
    plain = net()
    assert torch.equal(looped(plain, 1)(X), plain(X))
    assert torch.equal(looped(plain, 4)(X), plain(X))  # nothing is carried: all steps are alike
    for steps in (0, -1, True, 1.5):
        with pytest.raises(ArgumentError, match="a loop without steps"):
            Loop(gatecc.Model[...].out, steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carry": "output"}, "cannot be carried at such a site"),
        ({"merge": "confident"}, "all steps are alike"),
        ({"carry": "spikes(threshold=0)"}, "out of range"),
        ({"carry": "spikes", "merge": "confident(threshold=-1)"}, "out of range"),
        ({"carry": "states(('a',))"}, "out of range"),
    ],
)
def test_options_that_make_no_loop(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Loop(gatecc.Model[...].out, 2, **options)


def test_sites_that_make_no_loop() -> None:
    gelu = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    with pytest.raises(SiteRefusedError, match="the rate of a neuron is no such activation"):
        looped(gelu, 2, torch.randn(2, 3), carry="spikes")
    rows = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(SiteRefusedError, match="one row of logits"):
        looped(rows, 2, torch.randn(2, 5, 3), carry="spikes", merge="confident")


# -- confident ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def stopped(model: Any, x: Tensor, steps: int, threshold: float) -> tuple[Tensor, list[int]]:
    """The rule in Python, on the traces of all steps."""
    traces = torch.stack(by_hand(model, x, steps)).cumsum(0)  # (T, B, C)
    sure = traces.softmax(-1).amax(-1) > threshold
    sure[-1] = True
    first = sure.int().argmax(0)
    rows = torch.arange(x.size(0))
    return traces[first, rows] / (first + 1).unsqueeze(-1), (first + 1).tolist()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.4, 0.6, 1.1])
@torch.no_grad()
def test_samples_that_are_sure_leave_the_batch(threshold: float) -> None:
    plain = net()
    x = torch.cat([X, 3 * X.flip(0)])
    model = looped(plain, 4, x, carry="spikes", merge=f"confident(threshold={threshold})")
    expected, steps = stopped(plain, x, 4, threshold)
    seen: list[int] = []
    with watched(lambda taken, _: seen.append(taken.counts[0])):
        got = model(x)
    assert torch.allclose(got, expected, atol=1e-6)
    later = [sum(s > t for s in steps) for t in (1, 2, 3)]
    assert seen == later[: len(seen)]  # steps that nobody takes do not run, nor those behind
    assert len(seen) == min(3, sum(n > 0 for n in later) + 1)
    exported = torch.export.export(model, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-5)  # masked is skipping
    for rows in (x[:1], x[:0], x[:3]):
        assert torch.allclose(model(rows), expected[: rows.size(0)], atol=1e-6)
    if threshold > 1:
        assert torch.equal(got, looped(plain, 4, x, carry="spikes")(x))


def test_the_threshold_is_a_buffer_and_training_goes_on_masked() -> None:
    model = looped(net(), 3, carry="spikes", merge="confident(threshold=1.1)")
    name = next(n for n, _ in model.named_buffers() if n.endswith("confidence.threshold"))
    full = model(X)
    model.get_buffer(name).fill_(0.0)
    assert torch.allclose(model(X), by_hand(net(), X, 3)[0], atol=1e-6)
    assert not torch.equal(full, model(X))
    model.train()
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_saved_loops_load(tmp_path: Any) -> None:
    model = looped(net(), 3, carry="spikes(threshold=0.8)", merge="confident(threshold=0.4)", scaled="conv[...].out")
    with torch.no_grad():
        for _, p in model.named_parameters():
            p.mul_(1.1)
    gatecc.save(model, tmp_path)
    assert torch.equal(gatecc.load(net(), tmp_path)(X), model(X))
