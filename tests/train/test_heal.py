"""heal: both stages, adapters, what is refused, and runs that were cut off."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gatecc
from gatecc.errors import ArgumentError, CheckpointError, MissingPackageError, TrainingError
from gatecc.train import Healed, Lora, Transfer, Tune, heal, kld, next_token_loss, topk_kld
from gatecc.train.stage import hidden_matrices
from tests.train.lm import LM, VOCABULARY, batches, pair

ATTENTION = ("layers.*.attn",)


def distance(student: nn.Module, teacher: nn.Module) -> float:
    """KL from the teacher on a batch."""
    with torch.no_grad():
        return float(kld(student(batches()[0]), teacher(batches()[0])))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}


def gated() -> tuple[nn.Module, nn.Module]:
    """A transformed student whose gates are not at identity, and the model before."""
    _, teacher = pair()
    ids = batches()[0]
    student = gatecc.transform(teacher, gatecc.recipe("gated-attention", init="random(std=1)"), (ids,), verify=False)
    return student, teacher


def test_transfer_makes_each_layer_yield_what_the_teachers_does() -> None:
    student, teacher = pair()
    before, start = weights(student), distance(student, teacher)
    result = heal(student, teacher, batches(), transfer=Transfer(steps=60, lr=1e-2, layers=ATTENTION))
    losses = [p.loss for p in result.curve if p.stage == "transfer"]
    assert losses[-1] < 0.4 * losses[0]
    assert distance(student, teacher) < 0.5 * start
    assert all(".attn." in n for n in changed(before, student))
    assert result.tokens == 60 * 4 * 12
    assert result.curve[-1].tokens == result.tokens


def test_layers_learn_independently() -> None:
    """Trained beside the other layer or alone, a layer becomes the same, whatever stands below it."""
    (both, teacher), (alone, _) = pair(), pair()
    nn.init.normal_(alone.get_parameter("layers.0.attn.q_proj.weight"))
    stage = Transfer(steps=5, lr=1e-2, layers=ATTENTION)
    heal(both, teacher, batches(), transfer=stage)
    heal(alone, teacher, batches(), transfer=Transfer(steps=5, lr=1e-2, layers=("layers.1.attn",)))
    for name in ("q_proj", "o_proj"):
        path = f"layers.1.attn.{name}.weight"
        assert torch.equal(both.get_parameter(path), alone.get_parameter(path))


def test_the_transfer_finds_rewritten_layers_and_trains_what_is_new() -> None:
    student, teacher = gated()
    before, start = weights(student), distance(student, teacher)
    heal(student, teacher, batches(), transfer=Transfer(steps=60, lr=1e-1, train="new"))
    assert distance(student, teacher) < 0.5 * start
    assert changed(before, student) == {n for n in before if ".gate." in n}


@pytest.mark.parametrize("stage", [Tune(60, lr=1e-2, task=0, distill=1), Tune(60, lr=1e-2, task=0, distill=1,
                                   distance=lambda s, t: topk_kld(s, t, 8, 0.5), accumulate=2)])  # fmt: skip
def test_distillation_brings_the_student_to_the_teacher(stage: Tune) -> None:
    student, teacher = pair()
    start = distance(student, teacher)
    result = heal(student, teacher, batches(), tune=stage, evaluate=lambda m: distance(m, teacher), every=20)
    assert distance(student, teacher) < 0.2 * start
    assert [t for t, _ in result.values] == [n * 48 * stage.accumulate for n in (0, 20, 40, 60)]
    assert result.values[-1][1] == pytest.approx(distance(student, teacher))


def test_hidden_states_are_matched_in_the_students_own_stream() -> None:
    """The loss is the hand-written one, of both models on the same batch; no logits are needed to learn from it."""
    student, teacher = pair()
    stage = Tune(steps=30, lr=1e-2, task=0, hidden=2.0, layers=("layers.?",))
    with torch.no_grad():
        streams = [model.get_submodule("embed")(batches()[0]) for model in (student, teacher)]
        errors: list[Tensor] = []
        for i in range(2):
            streams = [m.get_submodule(f"layers.{i}")(x) for m, x in zip((student, teacher), streams, strict=True)]
            errors.append((streams[0] - streams[1]).square().mean() / streams[1].square().mean())
    before = distance(student, teacher)
    losses = [p.loss for p in heal(student, teacher, batches(), tune=stage).curve if p.stage == "tune"]
    assert losses[0] == pytest.approx(2 * float(torch.stack(errors).mean()), rel=1e-5)
    assert losses[-1] < 0.6 * losses[0]
    assert distance(student, teacher) < before


def test_padding_and_layers_that_do_not_run_have_no_hidden_states_to_match() -> None:
    ids = batches()[0]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    stage = Tune(steps=1, task=0, hidden=1.0, layers=("layers.?",))

    def first(batch: Any) -> float:
        student, teacher = pair()
        return heal(student, teacher, [batch], tune=stage).curve[1].loss

    shown, padded = first(ids[:, :8]), first({"input_ids": ids, "attention_mask": mask})
    assert padded == pytest.approx(shown, rel=1e-5)  # causal: what follows changes nothing before it
    assert abs(first(ids) - shown) > 1e-4
    student, teacher = pair()
    for model in (student, teacher):
        model.spare = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match="did not run alike"):
        heal(student, teacher, [ids], tune=Tune(steps=1, task=0, hidden=1.0, layers=("spare",)))


def test_a_student_learns_its_task_without_a_teacher() -> None:
    """Tokens that count up: the next one is known."""
    student, _ = pair()
    data = [(torch.arange(12) + torch.arange(4)[:, None] * 5 + i) % VOCABULARY for i in range(6)]
    result = heal(student, None, data, tune=Tune(80, lr=1e-2))
    assert result.curve[-1].loss < 0.3 < 2.5 < result.curve[1].loss


def test_healing_under_inference_mode_trains() -> None:
    student, _ = pair()
    before, data = weights(student), batches()
    with torch.inference_mode():
        heal(student, None, data, tune=Tune(1))
    assert changed(before, student)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    student, teacher = pair()
    stage = Tune(60, optimizer="muon", lr=2e-2, task=0, distill=1)
    trained = dict(student.named_parameters())
    muon, adamw = stage.optimizers(trained, frozenset(), hidden_matrices(student))
    taken = {id(p) for g in muon.param_groups for p in g["params"]}
    assert {n for n, p in trained.items() if id(p) in taken} == {
        n for n in trained if "proj" in n or ("mlp" in n and "weight" in n)
    }
    assert sum(len(g["params"]) for o in (muon, adamw) for g in o.param_groups) == len(trained)
    start = distance(student, teacher)
    heal(student, teacher, batches(), tune=stage)
    assert distance(student, teacher) < 0.2 * start


def test_a_loss_of_ones_own_and_bf16_products() -> None:
    student, teacher = pair()

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        assert output.dtype is torch.bfloat16
        return next_token_loss(output, batch)

    result = heal(student, teacher, batches(1), tune=Tune(40, lr=1e-2, loss=loss, autocast=torch.bfloat16))
    assert result.curve[-1].loss < 0.7 * result.curve[1].loss
    assert student.head.weight.dtype is torch.float32


@pytest.mark.parametrize("make", [pair, gated])
def test_adapters_act_and_are_merged(make: Any) -> None:
    """In a Python module and inside a captured scope: the same globs, low-rank changes, nothing else trained."""
    student, teacher = make()
    before, start = weights(student), distance(student, teacher)
    lora = Lora(rank=2, alpha=8, targets=("*.attn.*_proj.weight",))
    stage = Tune(40, lr=3e-2, task=0, distill=1, lora=lora, train=("nothing",))
    result = heal(student, teacher, batches(), tune=stage, evaluate=lambda m: distance(m, teacher), every=39)
    assert changed(before, student) == {n for n in before if "_proj.weight" in n}
    for name in changed(before, student):
        assert torch.linalg.matrix_rank(student.get_parameter(name).detach() - before[name], atol=1e-4) <= 2
    assert distance(student, teacher) < 0.7 * start
    (_, _), (_, almost), (_, last) = result.values  # adapted at step 39, merged at 40: no jump between them
    assert last == pytest.approx(almost, rel=0.1)


def test_with_adapters_new_parameters_train_in_full() -> None:
    student, teacher = gated()
    before = weights(student)
    heal(student, teacher, batches(), tune=Tune(3, distill=1, lora=Lora(targets=("*q_proj.weight",))))
    assert changed(before, student) == {n for n in before if ".gate." in n or "q_proj.weight" in n}


def cut(student: nn.Module, teacher: nn.Module, folder: Path, after: int | None) -> Healed:
    """Heal with dropout, shuffled data and both stages; ``after`` so many evaluations the run is cut off."""
    left = [after]

    def evaluate(model: nn.Module) -> float:
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return distance(model, teacher)

    data = DataLoader(TensorDataset(torch.cat(batches())), batch_size=5, shuffle=True)
    return heal(
        student, teacher, data, checkpoint=folder, save_every=3, evaluate=evaluate, every=1,
        transfer=Transfer(steps=7, lr=1e-2, layers=ATTENTION),
        tune=Tune(steps=8, optimizer="muon", lr=1e-2, distill=1, train=("layers.*",),
                  lora=Lora(2, targets=("*q_proj.weight",))),
    )  # fmt: skip


@pytest.mark.parametrize("after", [2, 5, 8, 13])
def test_a_run_that_was_cut_off_goes_on_bit_by_bit(after: int, tmp_path: Path) -> None:
    student, teacher = pair(dropout=0.1)
    torch.manual_seed(3)
    whole = cut(student, teacher, tmp_path / "whole", None)
    again, _ = pair(dropout=0.1)
    torch.manual_seed(3)
    with pytest.raises(KeyboardInterrupt):
        cut(again, teacher, tmp_path / "cut", after)
    fresh, _ = pair(dropout=0.1)
    torch.manual_seed(4)  # another process would stand elsewhere
    if not (tmp_path / "cut" / "heal.json").exists():
        torch.manual_seed(3)  # nothing was saved yet: the run begins again
    resumed = cut(fresh, teacher, tmp_path / "cut", None)
    assert [(p.step, p.tokens, p.loss, p.value) for p in resumed.curve[1:]] == [
        (p.step, p.tokens, p.loss, p.value) for p in whole.curve[1:]
    ]
    assert all(torch.equal(p, fresh.get_parameter(n)) for n, p in student.named_parameters())
    done, _ = pair(dropout=0.1)
    assert len(cut(done, teacher, tmp_path / "cut", None).curve) == len(whole.curve)
    assert all(torch.equal(p, done.get_parameter(n)) for n, p in student.named_parameters())


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path) -> None:
    """As the uninterrupted run of all steps, where the rate does not depend on their number."""
    level: dict[str, Any] = {"lr": 1e-2, "distill": 1.0, "warmup": 0, "floor": 1.0, "optimizer": "muon"}
    (whole, teacher), (parts, _) = pair(), pair()
    data = batches()
    want = heal(whole, teacher, data, transfer=Transfer(3, layers=ATTENTION), tune=Tune(5, **level))
    heal(parts, teacher, data, transfer=Transfer(3, layers=ATTENTION), checkpoint=tmp_path)
    for steps in (2, 5):  # a stage more, then more steps of it, each in a model of its own
        parts, _ = pair()
        stages: dict[str, Any] = {"transfer": Transfer(3, layers=ATTENTION), "tune": Tune(steps, **level)}
        found = heal(parts, teacher, data, checkpoint=tmp_path, **stages)
    assert [(p.stage, p.step, p.loss) for p in found.curve[1:]] == [(p.stage, p.step, p.loss) for p in want.curve[1:]]
    assert all(torch.equal(p, parts.get_parameter(n)) for n, p in whole.named_parameters())


def test_the_rates_of_a_run_that_goes_on_are_those_of_all_its_steps(tmp_path: Path) -> None:
    student, teacher = pair()
    seen: list[float] = []
    stages = [Tune(n, distill=1.0, warmup=0) for n in (4, 8)]

    class Seen(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatecc.train.stage.AdamW", Seen)
        for stage in stages:
            heal(student, teacher, batches(), tune=stage, checkpoint=tmp_path)
    assert seen == [1e-3 * stages[n > 3].rate(n) for n in range(8)]


def test_a_checkpoint_of_another_run_or_model_is_refused(tmp_path: Path) -> None:
    student, teacher = pair()
    heal(student, teacher, batches(), tune=Tune(2), checkpoint=tmp_path)
    for other, found, expected in (
        (Tune(1), "Tune.steps was 2 (2 done)", "Tune.steps is 1"),
        (Tune(3, lr=0.5, clip=0), "Tune.lr was 0.001; Tune.clip was 1.0", "Tune.lr is 0.5; Tune.clip is 0"),
    ):
        with pytest.raises(CheckpointError, match="another healing run") as raised:
            heal(student, teacher, batches(), tune=other, checkpoint=tmp_path)
        assert (raised.value.found, raised.value.expected) == (found, expected)  # the difference alone
    with pytest.raises(CheckpointError, match="another healing run") as raised:
        heal(student, teacher, batches(), transfer=Transfer(2, layers=ATTENTION), tune=Tune(2), checkpoint=tmp_path)
    assert raised.value.found == "stage 1 was Tune"
    with pytest.raises(CheckpointError, match="another model"):
        heal(LM(layers=1), teacher, batches(), tune=Tune(2), checkpoint=tmp_path)
    (tmp_path / "heal.json").write_text("{")
    with pytest.raises(CheckpointError):
        heal(student, teacher, batches(), tune=Tune(2), checkpoint=tmp_path)


def test_modes_and_gradients_are_as_before() -> None:
    student, teacher = pair()
    student.eval()
    student.layers[0].train()
    student.embed.weight.requires_grad_(False)
    modes = {n: m.training for n, m in student.named_modules()}
    heal(student, teacher, batches(), transfer=Transfer(1, layers=ATTENTION), tune=Tune(1, train=("head.*",)))
    assert {n: m.training for n, m in student.named_modules()} == modes
    assert {n for n, p in student.named_parameters() if not p.requires_grad} == {"embed.weight"}
    assert not teacher.training


def test_batches_of_every_kind() -> None:
    """Padding is left out of the loss and the count; labels of one's own decide where the loss is taken."""
    student, teacher = pair()
    ids = batches()[0]
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    garbage = torch.where(mask == 0, torch.randint_like(ids, VOCABULARY), ids)

    def first(batch: Any, **stage: Any) -> Healed:
        return heal(copy.deepcopy(student), teacher, [batch], tune=Tune(1, **stage))

    plain = first(ids[:, :8])
    for batch in ((ids[:, :8],), [ids[:, :8]], {"input_ids": garbage, "attention_mask": mask}):
        assert first(batch).curve[1].loss == pytest.approx(plain.curve[1].loss, rel=1e-5)
        assert first(batch).tokens == 32
    padded = first({"input_ids": garbage, "attention_mask": mask}, task=0, distill=1)
    assert padded.curve[1].loss == pytest.approx(first(ids[:, :8], task=0, distill=1).curve[1].loss, rel=1e-5)
    labels = torch.full_like(ids, -100)
    labels[:, 5] = ids[:, 5]
    only = first({"input_ids": ids, "labels": labels}).curve[1].loss
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(student(ids)[:, 4], ids[:, 5])
    assert only == pytest.approx(float(want), rel=1e-5)
    with pytest.raises(ArgumentError, match="unknown kind"):
        first("text")


def test_what_cannot_be_done_is_refused() -> None:
    student, teacher = pair()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "no stage"),
        ({"transfer": Transfer(1)}, "no layers"),
        ({"transfer": Transfer(1, layers=("layers.*.nose",))}, "no layers"),
        ({"transfer": Transfer(1, layers=ATTENTION, train="new")}, "no parameter"),
        ({"tune": Tune(1, lora=Lora(targets=("*.nose",)))}, "selects no matrix"),
    )
    for options, what in cases:
        with pytest.raises(ArgumentError, match=what):
            heal(student, teacher, batches(), **options)
    with pytest.raises(ArgumentError, match="teacher"):
        heal(student, None, batches(), tune=Tune(1, distill=1))
    with pytest.raises(ArgumentError, match="teacher is the student"):
        heal(student, student, batches(), tune=Tune(1))
    with pytest.raises(ArgumentError, match="ended"):
        heal(student, teacher, iter(batches(2)), tune=Tune(3))
    with pytest.raises(ArgumentError, match="ended"):
        heal(student, teacher, [], tune=Tune(3))
    with pytest.raises(TrainingError, match="not finite"):
        heal(student, teacher, batches(), tune=Tune(3, loss=lambda out, _: out.sum() / 0))
    with pytest.raises(ArgumentError):
        Tune(0)
    with pytest.raises(ArgumentError):
        Tune(1, task=0)
    with pytest.raises(ArgumentError):
        Transfer(1, train="some")  # pyright: ignore[reportArgumentType]


def test_an_adapter_that_the_forward_does_not_read_is_no_success() -> None:
    student, teacher = pair()
    student.register_module("spare", nn.Linear(4, 4))
    before = weights(student)
    with pytest.raises(TrainingError, match="no effect"):
        heal(student, teacher, batches(), tune=Tune(5, lora=Lora(targets=("*q_proj.weight", "spare.weight"))))
    assert not changed(before, student)


def test_a_layer_inside_a_larger_graph_is_refused() -> None:
    _, teacher = pair()
    student = gatecc.transform(teacher, "gated-attention", (batches()[0],), scope="model", verify=False)
    with pytest.raises(ArgumentError, match="inside a larger"):
        heal(student, teacher, batches(), transfer=Transfer(1, layers=ATTENTION))
    with pytest.raises(ArgumentError, match="no layers"):
        heal(student, teacher, batches(), transfer=Transfer(1))


def test_peft_wraps_python_modules_only() -> None:
    pytest.importorskip("peft", reason="peft is an optional extra")
    lora = Lora(rank=2, alpha=8, targets=("*.attn.*_proj.weight",), package="peft")
    student, teacher = pair()
    start, frozen = distance(student, teacher), weights(student)["layers.0.attn.q_proj.weight"]
    heal(student, teacher, batches(), tune=Tune(40, lr=3e-2, task=0, distill=1, lora=lora))
    assert distance(student, teacher) < 0.7 * start
    assert torch.equal(student.get_parameter("layers.0.attn.q_proj.base_layer.weight"), frozen)
    inside, plain = gated()
    with pytest.raises(ArgumentError, match="peft cannot wrap"):
        heal(inside, plain, batches(), tune=Tune(1, lora=lora))


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    student, teacher = pair()
    with pytest.raises(MissingPackageError, match="pip install"):
        heal(student, teacher, batches(), tune=Tune(1, lora=Lora(targets=("*q_proj.weight",), package="peft")))
