"""The cost of a run: what it counts is what the equations say, and what is left out costs nothing."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import gatecc
from gatecc.engine.spent import masked_forms
from gatecc.errors import ArgumentError, ExampleInputsError, UnsupportedModelError
from gatecc.ir.router import RouterSpec
from gatecc.ops import registry
from gatecc.passes.route.route import Route
from gatecc.recipes import samples
from gatecc.report.cost import RunCost, Spent, TakenRow, bars
from gatecc.report.curve import curve
from tests.engine.test_measured import F_, D, T, routed
from tests.passes.ensemble.models import TEXT, texts

IDS = {"input_ids": torch.randint(0, 40, (3, 10), generator=torch.Generator().manual_seed(0))}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40, use_cache=False
    )
    return LlamaForCausalLM(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4)).eval()


@pytest.mark.parametrize(("make", "inputs"), [(llama, IDS), (vit, {"pixel_values": torch.randn(3, 3, 16, 16)})])
def test_a_plain_model_has_one_path(make: Any, inputs: dict[str, torch.Tensor]) -> None:
    model = make()
    found = gatecc.cost(model, inputs, rounds=1)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**inputs)
    assert (found.ran.flops, found.samples) == (counter.get_total_flops() / 3, 3)
    assert found.ran == found.full
    assert found.flops_share == found.time_share == 1
    assert found.taken == ()
    assert found.uncounted == ()
    assert found.ran.seconds
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) * 4 / 3  # each matrix is read once
    assert found.ran.bytes > weights * 0.5
    with pytest.raises(ArgumentError, match="nothing to draw"):
        found.save("taken.png")


def test_experts_cost_what_tokens_chose() -> None:
    model, x = routed("softmax_topk(2)", "copies(4)")
    found = gatecc.cost(model, (x,), rounds=2, each=True)
    scores = 2 * T * D * 4
    assert found.ran.flops * 2 == scores + 2 * T * (2 * 2 * D * F_)
    assert found.full.flops * 2 == scores + 4 * T * (2 * 2 * D * F_)
    chosen = (x.flatten(0, 1) @ model.router.weight.T).topk(2).indices.flatten().bincount(minlength=4)
    (row,) = found.taken
    assert (row.site, row.kind, row.counts, row.of) == ("experts", "expert", tuple(chosen.tolist()), T)
    assert found.each == (found.ran.flops,) * 2
    assert found.ran.seconds
    assert found.full.seconds
    assert not found.notes


def test_bytes_are_those_of_the_experts_that_are_read() -> None:
    model, x = routed("softmax_topk(1, straight=True)", "copies(4)")
    with torch.no_grad():
        model.router.weight.zero_()  # the first wins
    found = gatecc.cost(model, (x,), rounds=0)
    expert = (model.experts.gate_up_proj[0].numel() + model.experts.down_proj[0].numel()) * 4
    biases = sum(b[0].numel() for n, b in model.experts.named_parameters() if "bias" in n and b.dim() == 2) * 4
    assert found.taken[0].counts == (T, 0, 0, 0)
    assert (found.full.bytes - found.ran.bytes) * 2 == pytest.approx(3 * (expert + biases))
    assert found.ran.seconds is None
    assert found.time_share is None


def test_a_masked_form_is_the_operator() -> None:
    model, x = routed("softmax_topk(2)", "copies(4)")
    entry: Any = registry.find(torch.ops.gatecc.moe_ffn.default)
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return entry.masked(*args, **options)

    with torch.no_grad():
        expected = model(x)
        with masked_forms([replace(entry, masked=counted)], "cpu"):
            assert torch.allclose(model(x), expected, atol=1e-5)
        assert torch.equal(model(x), expected)
        assert calls == [1]


def test_members_that_nobody_chose_cost_nothing() -> None:
    torch.manual_seed(0)
    model: Any = gatecc.transform(texts(), gatecc.recipe("tryage", hidden=8), TEXT, verify=False)
    with torch.no_grad():
        model.get_parameter("router.weight").normal_()
        chosen = model.logits(**TEXT).argmin(-1).bincount(minlength=2)
    found = gatecc.cost(model, TEXT, rounds=1)
    (row,) = found.taken
    assert (row.site, row.kind, row.units) == ("router", "member", ("bert", "distil"))
    assert row.counts == tuple(chosen.tolist())
    assert row.of == 5
    costs = [model.costs[name].flops for name in row.units]
    missing = sum((5 - count) * flops for count, flops in zip(row.counts, costs, strict=True)) / 5
    assert found.full.flops - found.ran.flops == pytest.approx(missing)


def test_blocks_that_samples_skip_are_told_by_their_name() -> None:
    torch.manual_seed(0)
    image = {"pixel_values": torch.randn(4, 3, 16, 16)}
    router = RouterSpec("pool(in)", "linear", "softmax_topk(1, straight=True)", "random(std=3)")
    model: Any = gatecc.transform(vit(), Route("block[...]", router, "copies(1)", skip=True), image, verify=False)
    found = gatecc.cost(model, image, rounds=1)
    assert [row.site for row in found.taken] == ["layers.0", "layers.1"]
    block = 2 * 17 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 2 * 17 * 17 * 32  # four projections, the MLP, attention
    assert 0 < sum(row.counts[0] for row in found.taken) < 8
    left = sum(row.of - row.counts[0] for row in found.taken)
    assert (found.full.flops - found.ran.flops) * 4 == left * block
    assert {row.kind for row in found.taken} == {"block"}
    assert found.full.seconds


def test_json_text_report_and_curve(tmp_path: Path) -> None:
    model, x = routed("softmax_topk(2)", "copies(4)")
    cheap = gatecc.cost(model, (x,), rounds=0, label="k=2", accuracy=0.75)
    dear = replace(cheap, label="all", accuracy=0.8, ran=cheap.full)
    assert RunCost.from_json(cheap.to_json()) == cheap
    for word in ("k=2", "accuracy 0.75", "experts", f"{cheap.flops_share:.3f}"):
        assert word in str(cheap)
    report = gatecc.last_report(model)
    report.costs += [cheap, dear]
    assert gatecc.Report.from_json(report.to_json()).costs == [cheap, dear]
    assert "k=2" in str(report)
    page = report.to_html()
    assert page.count("<circle") == 2
    assert 'id="costs"' in page
    assert curve([cheap]) == ""
    for name in ("taken.png", "taken.svg", "cost.json", "cost.txt"):
        assert cheap.save(tmp_path / name).stat().st_size > 100
    with pytest.raises(ArgumentError, match="form"):
        cheap.save(tmp_path / "cost.xls")
    with pytest.raises(ArgumentError, match="not the cost"):
        RunCost.from_json("{}")


def test_many_units_share_bars() -> None:
    assert bars((0.0, 0.01, 0.5, 1.0)) == "·▁▅█"
    assert len(bars((1.0,) * 500)) == 48
    row = TakenRow("a", "block", (0, 4), 4)
    assert row.shares == (0.0, 1.0)
    assert row.share == 0.5
    assert RunCost("m", 1, Spent(0, 0), Spent(0, 0)).flops_share == 1


def test_bad_input_is_refused() -> None:
    model, x = routed("softmax_topk(2)", "copies(4)")
    with pytest.raises(ExampleInputsError, match="does not run"):
        gatecc.cost(model, (x[..., :2],))
    with pytest.raises(ArgumentError, match="per sample"):
        gatecc.cost(model, (x[:0],))
    with pytest.raises(ArgumentError, match="no input has a row"):
        gatecc.cost(nn.Identity(), (3,))
    wrong: Any = len
    with pytest.raises(UnsupportedModelError, match="not a model"):
        gatecc.cost(wrong, (x,))
    with pytest.raises(UnsupportedModelError, match="without weights"):
        gatecc.cost(nn.Linear(2, 2, device="meta"), (x,))


def test_compiled_code_is_counted_as_it_would_run_without_and_says_so() -> None:
    """A module inside, and a model compiled in place: the same figures, and a note that exits are masked."""
    model, inputs = samples.classifier()
    exits: Any = gatecc.transform(model, gatecc.Exit("block[:-1]", rule="confidence(0.0)"), inputs)
    plain = gatecc.cost(exits, inputs, rounds=0)
    assert plain.ran.flops < 0.5 * plain.full.flops
    assert not plain.notes
    in_place = copy.deepcopy(exits)
    in_place.compile(backend="eager")
    shell: Any = torch.compile(exits, backend="eager")
    for compiled in (nn.Sequential(shell), in_place):
        torch.compiler.reset()
        for _ in range(2):  # also where there is compiled code already
            found = gatecc.cost(compiled, inputs, rounds=1)
            assert (found.ran.flops, found.full.flops) == (plain.ran.flops, plain.full.flops)
            assert [row.counts for row in found.taken] == [row.counts for row in plain.taken]
            assert "computes what exits" in found.notes[-1]
