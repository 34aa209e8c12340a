"""The zoo is what it says: it builds, runs at all its sizes, and holds the attention that its specs count."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.zoo import FAST, SPECS, Inputs, Spec, observe, variants
from tests.zoo.spec import BATCH, VOCAB

EVERY = pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in variants()])


def tensors(output: Any) -> list[Tensor]:
    """The float tensors of what a model returned: ModelOutputs are dicts, caches are left out."""
    leaves = tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(*inputs.args, **inputs.kwargs))


def with_another_last_token(inputs: Inputs) -> Inputs | None:
    """The inputs with the last token of the (decoder's) sequence replaced. None if there is no sequence."""
    key = "decoder_input_ids" if "decoder_input_ids" in inputs.kwargs else "input_ids"
    sequence: Tensor | None = inputs.kwargs.get(key, inputs.args[0] if inputs.args else None)
    if sequence is None or sequence.dim() == 4:  # an image
        return None
    sequence = sequence.clone()
    sequence[:, -1] = sequence[:, -1] + 1 if sequence.is_floating_point() else sequence[:, -1] % (VOCAB - 1) + 1
    if key in inputs.kwargs:
        return Inputs(inputs.args, inputs.kwargs | {key: sequence})
    return Inputs((sequence, *inputs.args[1:]), inputs.kwargs)


@EVERY
def test_runs_at_every_size(spec: Spec) -> None:
    case = spec.build()
    start = time.process_time()
    outputs = run(case.model, case.inputs)
    assert time.process_time() - start < 1
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert 0.01 < max(float(output.abs().max()) for output in outputs) < 30, "outputs neither vanish nor explode"
    for inputs in case.dynamic:
        assert run(case.model, inputs)


@EVERY
def test_truth_is_as_expected(spec: Spec) -> None:
    case = spec.build()
    truth = observe(case.model, case.args, case.kwargs)
    assert (len(truth.cores), len(truth.others)) == (spec.cores, spec.others), truth
    assert set(truth.owners) <= {name for name, _ in case.model.named_modules()}
    if spec.impl:
        spelling = "sdpa" if spec.impl == "sdpa" else "softmax"
        assert any(core.spelling == spelling for core in truth.cores)
    if spec.mask and truth.cores:
        kinds = spec.mask.split(",")
        assert [core.mask for core in truth.cores] == (kinds * spec.cores if len(kinds) == 1 else kinds)


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in variants(fast=True)])
def test_is_deterministic(spec: Spec) -> None:
    torch.manual_seed(1)
    one = spec.build()
    torch.manual_seed(2)
    two = spec.build()
    for left, right in zip(run(one.model, one.inputs), run(two.model, two.inputs), strict=True):
        assert torch.equal(left, right)


@EVERY
def test_every_parameter_matters_and_trains(spec: Spec) -> None:
    """The model takes gradients in train mode, and no matrix is left at zero."""
    case = spec.build()
    for name, parameter in case.model.named_parameters():
        assert parameter.numel() == 0 or bool(parameter.any()), name
    case.model.train()
    outputs = tensors(case.model(*case.args, **case.kwargs))
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in case.model.parameters())


def pairs() -> list[tuple[Spec, Spec]]:
    """Every architecture that runs fused and spelled out."""
    return [
        (spec, SPECS[name.replace("-sdpa", "-eager")])
        for name, spec in variants()
        if name.endswith("-sdpa") and name.replace("-sdpa", "-eager") in SPECS
    ]


@pytest.mark.parametrize(("fused", "spelled"), [pytest.param(*pair, id=pair[0].name) for pair in pairs()])
def test_implementations_agree(fused: Spec, spelled: Spec) -> None:
    """The same weights give the same outputs, except at the padding."""
    one, two = fused.build(), spelled.build()
    keep = one.kwargs.get("attention_mask")
    for left, right in zip(run(one.model, one.inputs), run(two.model, two.inputs), strict=True):
        if keep is not None and left.dim() == 3:
            left, right = left[keep.bool()], right[keep.bool()]
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@EVERY
def test_causality_is_as_flagged(spec: Spec) -> None:
    """In a causal model another last token leaves the earlier outputs as they are, and in no other model."""
    case = spec.build()
    changed = with_another_last_token(case.inputs)
    if changed is None:
        assert not case.causal
        return
    one, two = run(case.model, case.inputs)[0], run(case.model, changed)[0]
    if one.dim() < 3:  # one vector for the whole sequence
        assert not case.causal
        return
    assert not torch.equal(one, two)
    if not case.causal and len(case.args) > 1:  # cross-attention: its queries do not see each other either
        return
    keep = case.kwargs.get("attention_mask", torch.ones(one.shape[:2]))[:, :-1].bool()
    assert (float((one - two)[:, :-1][keep].abs().max()) < 1e-6) == case.causal


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in variants("hf")])
def test_decoders_generate(spec: Spec) -> None:
    case = spec.build()
    generate: Any = getattr(case.model, "generate", None)
    if not case.decoder:
        assert not case.causal
        return
    kwargs = {key: value for key, value in case.kwargs.items() if key != "decoder_input_ids"}
    assert generate(**kwargs, max_new_tokens=2, do_sample=False).shape[0] == BATCH


def test_the_zoo_is_wide_enough() -> None:
    architectures = {(spec.family, spec.name) for spec in SPECS.values() if spec.cores}
    assert len(architectures) >= 100
    assert {spec.impl for spec in SPECS.values()} == {"sdpa", "eager", ""}
    assert set(FAST) <= set(SPECS)
    assert [name for name, _ in variants(fast=True)] == [name for name in SPECS if name in FAST]
