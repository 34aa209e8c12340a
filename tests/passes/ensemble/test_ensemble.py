"""Ensembles of real models: what runs, what comes out, and that masked and skipped are the same."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.gates.choice import Chosen
from gatecc.ir.router import RouterSpec
from gatecc.passes.ensemble.ensemble import every_member
from gatecc.recipes import ensembles, samples
from tests.passes.ensemble.models import IDS, MASK, PIXELS, TEXT, by_hand, calls_of, images, tensor_of, texts


def routed(choice: str, ensemble: gatecc.Ensemble | None = None, **options: Any) -> gatecc.Ensemble:
    ensemble = texts() if ensemble is None else ensemble
    spec = RouterSpec("features", "linear", choice, "random(1.0)")
    inputs = TEXT if "input_ids" in ensemble.inputs.all else {"pixel_values": PIXELS}
    torch.manual_seed(0)
    made = gatecc.transform(ensemble, gatecc.Choose(gatecc.Model, spec, **options), inputs)
    assert isinstance(made, gatecc.Ensemble)
    return made


@pytest.fixture(scope="module")
def top1() -> gatecc.Ensemble:
    return routed("softmax_topk(1, straight=True)")


def sent_to(ensemble: gatecc.Ensemble, rows: list[int]) -> Tensor:
    """Set the router to logits that send each sample of TEXT to a member; returns the one-hot choice (B, E)."""
    chooser = ensemble.chooser
    assert chooser is not None
    read = ensemble.features["prompt"](IDS).mean(1).double()
    wanted = torch.nn.functional.one_hot(torch.tensor(rows), 2).double() * 20 - 10
    with torch.no_grad():
        chooser.get_parameter("weight").copy_((torch.linalg.pinv(read) @ wanted).T)
        chooser.get_parameter("bias").zero_()
    return (wanted > 0).float()


def test_until_it_has_a_router_it_is_the_mean() -> None:
    ensemble = texts()
    out = ensemble(**TEXT)
    assert type(out).__name__ == "SequenceClassifierOutput"
    expected = by_hand(ensemble, torch.full((5, 2), 0.5), **TEXT)
    assert torch.allclose(out.logits, expected, atol=1e-6)
    assert torch.equal(ensemble(IDS, MASK).logits, out.logits)


@settings(max_examples=12)
@given(st.lists(st.integers(0, 1), min_size=5, max_size=5))
def test_each_sample_runs_through_its_member_alone(top1: gatecc.Ensemble, rows: list[int]) -> None:
    one_hot = sent_to(top1, rows)
    with torch.no_grad(), calls_of(top1) as calls:
        out = top1(**TEXT).logits
    assert {name: sum(sizes) for name, sizes in calls.items()} == {"bert": rows.count(0), "distil": rows.count(1)}
    assert all(len(sizes) <= 1 and 0 not in sizes for sizes in calls.values())
    assert torch.allclose(out, by_hand(top1, one_hot, **TEXT), atol=1e-6)


def test_what_nobody_chose_is_not_called_and_the_other_is_bitwise_itself(top1: gatecc.Ensemble) -> None:
    sent_to(top1, [1] * 5)
    with torch.no_grad(), calls_of(top1) as calls:
        out = top1(**TEXT).logits
    assert calls == {"bert": [], "distil": [5]}
    assert torch.equal(out, top1.members["distil"](**TEXT).logits)


@pytest.mark.parametrize("choice", ["softmax_topk(1, straight=True)", "softmax_topk(2)", "independent"])
def test_masked_and_skipped_have_the_same_outputs_and_gradients(choice: str) -> None:
    model = routed(choice)
    found: list[tuple[Tensor, list[Tensor | None]]] = []
    for masked in (False, True):
        model.masked = masked
        model.zero_grad()
        out = model(**TEXT).logits
        (out * torch.linspace(-1, 1, 3)).square().sum().backward()
        found.append((out, [p.grad for p in model.parameters()]))
    (skipped, gradients), (whole, others) = found
    assert torch.allclose(skipped, whole, atol=1e-6)
    pairs = list(zip(gradients, others, strict=True))
    assert sum(g is not None for g, _ in pairs) > len(pairs) / 2
    for g, other in pairs:
        assert torch.allclose(
            torch.zeros(()) if g is None else g, torch.zeros(()) if other is None else other, atol=1e-5
        )
    assert float(model.get_parameter("router.weight").grad.abs().sum()) > 0  # pyright: ignore[reportOptionalMemberAccess] - it has one


def test_frozen_members_have_no_gradient_and_the_router_has(top1: gatecc.Ensemble) -> None:
    model = copy.deepcopy(top1)
    model.members.requires_grad_(False)
    sent_to(model, [0, 1, 0, 1, 1])
    model(**TEXT).logits.square().sum().backward()
    trained = [name for name, p in model.named_parameters() if p.grad is not None]
    assert trained == ["router.weight", "router.bias"]


def test_dropout_is_drawn_in_training_only(top1: gatecc.Ensemble) -> None:
    model = copy.deepcopy(top1).train()
    assert not torch.equal(model(**TEXT).logits, model(**TEXT).logits)
    assert torch.equal(top1(**TEXT).logits, top1(**TEXT).logits)


def test_members_of_two_libraries_with_parameters_of_other_names() -> None:
    model = routed("dense", images())
    weights = torch.softmax(model.logits(PIXELS), -1)
    with torch.no_grad():
        assert torch.allclose(model(PIXELS), by_hand(model, weights, PIXELS), atol=1e-5)


def test_a_member_that_reads_others_runs_them_for_its_own_samples_alone() -> None:
    class Fused(nn.Module):
        def forward(self, one: Any, other: Any) -> Any:
            return {"logits": one["logits"] * other["logits"]}

    class Plain(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.scale * x}

    members = {"fused": Fused(), "a": Plain(2.0), "b": Plain(3.0)}
    x = torch.arange(1.0, 5.0).view(4, 1).expand(4, 3)
    ensemble = gatecc.ensemble(members, (x,), inputs={"fused": {"one": "a", "other": "b"}})
    spec = RouterSpec("x", "none", "softmax_topk(1)")
    model: Any = gatecc.transform(ensemble, gatecc.Choose(gatecc.Model, spec), (x,), verify=False)
    x = torch.tensor([[0.0, 9.0, 0.0], [9.0, 1.0, 2.0], [0.0, 1.0, 9.0], [0.0, 9.0, 1.0]])
    with calls_of(model) as calls:
        out = model(x)["logits"]
    assert {name: sum(sizes) for name, sizes in calls.items() if name != "fused"} == {"a": 3, "b": 2}
    assert torch.equal(out, torch.stack([2 * x[0], 6 * x[1] * x[1], 3 * x[2], 2 * x[3]]))


class Doubled(nn.Module):
    """Reads the output of another member. x: (B, 2), half: (B, 2)"""

    def forward(self, x: Tensor, half: Tensor) -> Tensor:
        return 2 * half + x[:, :2]


@settings(max_examples=12)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 1000))
def test_any_number_of_members_and_samples(k: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    members = {"a": nn.Linear(3, 2), "reader": Doubled(), "b": nn.Linear(3, 2), "c": nn.Linear(3, 2)}
    x = torch.randn(2, 3)
    reads = {name: {"input": "x"} for name in "abc"} | {"reader": {"half": "b"}}
    ensemble = gatecc.ensemble(members, {"x": x}, inputs=reads)
    spec = RouterSpec("x", "linear", f"softmax_topk({k})", "random(3.0)")
    model: Any = gatecc.transform(ensemble, gatecc.Choose(gatecc.Model, spec), {"x": x}, verify=False)
    x = torch.randn(rows, 3)
    with torch.no_grad(), calls_of(model) as calls:
        out = model(x)
    weights, indices = model.chosen(x)
    hand = torch.zeros(rows, 4).scatter(-1, indices, weights)
    by_member = dict(zip(members, (hand > 0).T, strict=True))
    by_member["b"] = by_member["b"] | by_member["reader"]
    if rows:
        assert {n: sum(sizes) for n, sizes in calls.items()} == {n: int(w.sum()) for n, w in by_member.items()}
        assert torch.allclose(out, by_hand(ensemble, hand, x), atol=1e-5)
        model.masked = True
        assert torch.allclose(model(x), out, atol=1e-6)
    assert out.shape == (rows, 2)


def test_no_samples_and_no_chosen_members() -> None:
    model = routed("softmax_topk(1)")
    with torch.no_grad(), calls_of(model) as calls:
        assert model(IDS[:0], MASK[:0]).logits.shape == (0, 3)
    assert calls == {"bert": [1], "distil": []}  # one sample, made up, tells the shape
    among = routed("among")
    assert among.chooser is not None
    among.chooser.get_buffer("allowed")[1] = False
    with torch.no_grad(), calls_of(among) as calls:
        one = among(**TEXT).logits
    assert calls == {"bert": [5], "distil": []}
    assert torch.equal(one, among.members["bert"](**TEXT).logits)


def test_samples_without_a_member_are_zero(monkeypatch: pytest.MonkeyPatch, top1: gatecc.Ensemble) -> None:
    with torch.no_grad():
        alone = top1.members["distil"](**TEXT).logits
        for rows in ([2, 1, 2, 2, 1], [2] * 5):
            chosen = Chosen(torch.ones(5, 1), torch.tensor(rows)[:, None])
            monkeypatch.setattr(type(top1.chooser), "forward", lambda *_, chosen=chosen: chosen)
            expected = torch.where(chosen.indices == 1, alone, torch.zeros(()))
            assert torch.allclose(top1(**TEXT).logits, expected, atol=1e-6)
            with every_member(top1):
                assert torch.allclose(top1(**TEXT).logits, expected, atol=1e-6)


class Classes(nn.Module):
    """x: (B, 3) -> the number of a class and whether it is the first, (B,) each"""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.argmax(-1) + self.shift, x.argmax(-1) == 0


def test_whole_numbers_are_chosen_and_never_weighted() -> None:
    x = torch.eye(3)
    ensemble = gatecc.ensemble([Classes(0), Classes(10)], (x,))
    with pytest.raises(ArgumentError, match="whole numbers cannot be weighted"):
        ensemble(x)
    with pytest.raises(ArgumentError, match="whole numbers cannot be weighted"):
        gatecc.transform(ensemble, gatecc.Choose(gatecc.Model, RouterSpec("x", "linear", "dense")), (x,))
    for masked in (False, True):
        model: Any = gatecc.transform(ensemble, "tabledart", (x,))
        model.masked = masked
        number, first = model(x)
        which = model.logits(x).argmax(-1)
        assert torch.equal(number, torch.arange(3) + 10 * which)
        assert first.tolist() == [True, False, False]


def test_a_nan_of_who_was_not_chosen_stays_there() -> None:
    class Broken(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * float("nan")

    x = torch.randn(4, 3)
    ensemble = gatecc.ensemble({"good": nn.Linear(3, 2), "bad": Broken(3, 2)}, (x,))
    model: Any = gatecc.transform(ensemble, gatecc.recipe("global-local", t=2.0), (x,), verify=False)
    for masked in (False, True):
        model.masked = masked
        model.zero_grad()
        out = model(x)
        out.sum().backward()
        assert torch.equal(out, ensemble.members["good"](x))
        assert bool(model.members["good"].weight.grad.isfinite().all())


def test_nan_of_the_router_is_an_error() -> None:
    model = routed("softmax_topk(2)")
    with torch.no_grad():
        model.get_parameter("router.weight")[0, 0] = float("nan")
    with pytest.raises(ArgumentError, match="no numbers") as raised:
        model(**TEXT)
    assert "5 of 5 samples" in raised.value.found


def test_names_copies_and_files(top1: gatecc.Ensemble, tmp_path: Path) -> None:
    sent_to(top1, [0, 1, 1, 0, 1])
    out = top1(**TEXT).logits
    assert {name.split(".")[0] for name in top1.state_dict()} == {"members", "features", "router"}
    for copied in (copy.deepcopy(top1), pickle.loads(pickle.dumps(top1))):
        assert torch.equal(copied(**TEXT).logits, out)
    gatecc.save(top1, tmp_path / "whole")
    gatecc.save(top1, tmp_path / "new", only_new=True)
    for folder in ("whole", "new"):
        loaded = gatecc.load(texts(), tmp_path / folder)
        assert isinstance(loaded, gatecc.Ensemble)
        assert torch.equal(loaded(**TEXT).logits, out)
    assert sum(f.stat().st_size for f in (tmp_path / "new").glob("*.safetensors")) < 10_000
    back = gatecc.revert(top1)
    assert list(back.state_dict()) == list(texts().state_dict())
    assert torch.equal(back(**TEXT).logits, texts()(**TEXT).logits)


def test_the_cost_of_a_path_is_what_runs(top1: gatecc.Ensemble) -> None:
    from gatecc.capture.flops import counted

    for number, name in enumerate(top1.members):
        sent_to(top1, [number] * 5)
        _, ran = counted(lambda: top1(**TEXT))
        assert ran == 5 * top1.path([name]).flops
        alone = sum(p.numel() for p in top1.members[name].parameters())
        embedding = 0 if name == "bert" else 50 * 16  # the router reads it; it is bert's own
        assert top1.path([name]).parameters == alone + embedding + 2 * 16 + 2
    whole = top1.path(top1.members)
    assert whole.parameters == sum(p.numel() for p in top1.parameters())
    assert f"{whole.parameters:,}" in top1.describe()
    report = gatecc.last_report(top1)
    assert f"all members: {whole}" in report.notes
    assert (report.totals.flops_after or 0) < (report.totals.flops_before or 0)


def test_compiled_members_run_alone_and_the_masked_form_is_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    plain, (x,) = ensembles.classifiers()
    model: Any = gatecc.transform(plain, gatecc.recipe("global-local", hidden=4), (x,), verify=False)
    with torch.no_grad():
        expected = model(x)
        for t, called in ((2.0, {"large": [6], "small": []}), (-1.0, {"large": [], "small": [6]})):
            model.router.threshold.fill_(t)
            counter = CompileCounter()
            with calls_of(model) as calls:
                assert torch.allclose(torch.compile(model, backend=counter)(x), model(x), atol=1e-6)
            assert calls == {name: 2 * sizes for name, sizes in called.items()}
            assert counter.frame_count > 0
            torch._dynamo.reset()
        model.router.threshold.fill_(0.5)
        model.masked = True
        whole = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(whole(x), expected, atol=1e-6)


def test_sites_inside_of_members_are_rewritten_and_the_whole_graph_is_refused() -> None:
    (one, inputs), (other, _) = samples.sequences(), samples.sequences()
    plain = gatecc.ensemble({"one": one, "other": other}, inputs)
    model = gatecc.transform(plain, gatecc.recipe("adaptdhm", k=2), inputs, verify=False)
    recipe = gatecc.recipe("gated-attention", init="identity")
    gated: Any = gatecc.transform(model, recipe, inputs, verify=False)
    made = {name.split(".")[1] for name, _ in gated.named_parameters() if "gate" in name}
    assert made == {"one", "other"}
    with torch.no_grad(), calls_of(gated) as calls:
        assert torch.allclose(gated(*inputs), model(*inputs), atol=1e-6)
    assert calls == {"one": [2], "other": [2]}
    with pytest.raises(SiteRefusedError, match="every member runs"):
        gatecc.transform(model, gatecc.Gate(gatecc.Model[...].out, gatecc.GateSpec("self")), inputs, verify=False)


def test_who_is_chosen_and_the_scores_run_only_what_the_router_reads(top1: gatecc.Ensemble) -> None:
    sent_to(top1, [0, 1, 1, 0, 1])
    with calls_of(top1) as calls:
        weights, members = top1.chosen(**TEXT)
        scores = top1.logits(**TEXT)
    assert calls == {"bert": [], "distil": []}
    assert members.squeeze(1).tolist() == scores.argmax(-1).tolist() == [0, 1, 1, 0, 1]
    assert torch.equal(weights, torch.ones(5, 1))


def test_balancing_sees_samples(top1: gatecc.Ensemble) -> None:
    spec = RouterSpec("features", "linear", "softmax_topk(1, straight=True)", "random(1.0)", "aux(0.1)")
    model = gatecc.transform(texts(), gatecc.Choose(gatecc.Model, spec), TEXT, verify=False).train()
    before = [
        gatecc.transform(
            texts(), gatecc.Choose(gatecc.Model, replace(spec, balance="none")), TEXT, verify=False
        ).train()
    ]
    grads: list[Tensor] = []
    for each in (model, *before):
        with torch.no_grad():
            each.get_parameter("router.weight").copy_(torch.linspace(-1, 1, 32).view(2, 16))
        (each(**TEXT).logits * 0).sum().backward()
        grads.append(each.get_parameter("router.weight").grad)  # pyright: ignore[reportArgumentType] - it has one
    assert float(grads[0].abs().sum()) > 0
    assert float(grads[1].abs().sum()) == 0


def test_logits_and_the_tensor_of_a_model() -> None:
    assert torch.equal(tensor_of(texts().members["bert"](**TEXT)), texts().members["bert"](**TEXT).logits)
    with pytest.raises(ArgumentError, match="no router yet"):
        texts().logits(**TEXT)
