"""Identity gates on a model of the zoo, and everything that must hold of the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gatecc
from gatecc.capture.adapters import adapted, caches_off
from tests.zoo.spec import Case, Inputs
from tests.zoo.truth import Truth, observe


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point output tensors of a call without caches."""
    with adapted(model):
        out = model(*inputs.args, **inputs.kwargs)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference relative to max(1, max|a|), rows that are not finite in both left out."""
    assert [x.shape for x in a] == [y.shape for y in b]
    gaps = [_gap(x, y) for x, y in zip(a, b, strict=True)]
    return max(gaps, default=0.0)


def _gap(x: Tensor, y: Tensor) -> float:
    both = x.isfinite() & y.isfinite()
    assert torch.equal(x.isfinite(), y.isfinite())
    if not bool(both.any()):
        return 0.0
    x, y = x[both], y[both]
    return float(((x - y).abs().max() / x.abs().max().clamp(min=1)).detach())


def check_sites(report: gatecc.Report, truth: Truth) -> None:
    """Sites found are the cores that ran, owner for owner, in order; every core that was missed has a refusal."""
    found = [s.owner for s in report.sites if s.kind == "attention"]
    ran = [core.owner for core in truth.cores]
    extra = Counter(found) - Counter(ran)
    assert not extra, f"false hits: {extra}"
    missed = Counter(ran) - Counter(found)
    refused = Counter(r.owner for r in report.refusals if r.kind in ("attention", "module") and r.reason and r.remedy)
    silent = missed - refused
    assert not silent, f"missed in silence: {silent}"
    if not missed:
        assert found == ran


def check_identity(case: Case, gated: nn.Module) -> None:
    """Equal outputs on the example and at other batch sizes and lengths."""
    for inputs in (case.inputs, *case.dynamic):
        assert worst(outputs(case.model, inputs), outputs(gated, inputs)) <= 1e-6


def check_gradients(case: Case, gated: nn.Module, new: set[str]) -> None:
    """Every new parameter gets a finite gradient; every gate at least one that is not zero."""
    gated.zero_grad()
    generator = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs(gated, case.inputs))
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {name: p.grad for name, p in gated.named_parameters() if name in new}
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients.values())
    for gate in {name.rpartition(".")[0] for name in new}:
        assert any(g is not None and bool(g.any()) for n, g in gradients.items() if n.rpartition(".")[0] == gate), gate
    gated.zero_grad()


def check_modes(case: Case, gated: nn.Module) -> None:
    """In train mode, with the same seed, the gated model is the original; and again after the switch back."""
    case.model.train()
    gated.train()
    try:
        torch.manual_seed(5)
        expected = outputs(case.model, case.inputs)
        torch.manual_seed(5)
        assert worst(expected, outputs(gated, case.inputs)) <= 1e-6
    finally:
        case.model.eval()
        gated.eval()


MODES = [(training, gradients) for training in (False, True) for gradients in (True, False)]


def check_acts(case: Case, gated: nn.Module, new: set[str]) -> None:
    """Each gate alone, with random values, moves the outputs in all four modes, through the model's own call.

    One gate that acts must not hide another that is gone past, so they take turns; with gradients and without they give
    the same in eval mode. torch's fused paths are left as the user has them.
    """
    gates = {name.rpartition(".")[0] for name in new}
    for training, gradients in MODES:
        expected = called(case.model, case.inputs, training, gradients)
        for gate in sorted(gates):
            with random_values(gated.get_submodule(gate)):
                got = called(gated, case.inputs, training, gradients)
                other = got if training else called(gated, case.inputs, training, not gradients)
            assert worst(expected, got) > 1e-5, f"{gate}: training {training}, gradients {gradients}"
            assert worst(got, other) <= 1e-5, f"{gate}: gradients matter"


def called(model: nn.Module, inputs: Inputs, training: bool, gradients: bool) -> list[Tensor]:
    """The floating-point output tensors in a mode, from the same seed. Caches alone are off."""
    model.train(training)
    try:
        with torch.set_grad_enabled(gradients), caches_off(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            out = model(*inputs.args, **inputs.kwargs)
    finally:
        model.eval()
    leaves = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach() for leaf in leaves]


@contextmanager
def random_values(gate: nn.Module) -> Generator[None]:
    """A gate with random parameters for a while."""
    before = {name: p.detach().clone() for name, p in gate.named_parameters()}
    generator = torch.Generator().manual_seed(11)
    try:
        with torch.no_grad():
            for p in gate.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for name, p in gate.named_parameters():
                p.copy_(before[name])


def new_parameters(model: nn.Module, gated: nn.Module) -> set[str]:
    """The names that the gated model has and the original has not."""
    return {n for n, _ in gated.named_parameters()} - {n for n, _ in model.named_parameters()}


def truth_of(case: Case) -> Truth:
    """What ran, without caches."""
    with adapted(case.model):
        return observe(case.model, case.args, case.kwargs)


def inspected(case: Case) -> Any:
    """The report of an inspection of a case."""
    return gatecc.inspect(case.model, (case.args, case.kwargs))
