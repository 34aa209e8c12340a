"""Weights in fewer bits: what is quantised, how far the outputs are from those of before, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, ExportError
from gatecc.export.accuracy import Gathered, spearman
from gatecc.export.quantize import Quantize

pytest.importorskip("onnxruntime")


QUANTIZE = sys.modules["gatecc.export.quantize"]  # not by attributes: gatecc.export is a function


class Words(nn.Module):
    """A language model of one block whose embedding is its head too: (B, N) -> (B, N, 48)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.up, self.down, self.norm = nn.Linear(32, 64), nn.Linear(64, 32, bias=False), nn.LayerNorm(32)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.down(self.up(x).relu())
        return self.norm(x) @ self.embed.weight.T


def ids(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(0, 48, (batch, length))


@pytest.fixture(scope="module")
def words() -> nn.Module:
    torch.manual_seed(0)
    return Words().eval()


@pytest.mark.parametrize(
    ("options", "quantized", "error"),
    [
        (Quantize("w8"), {"com.microsoft::MatMulNBits": 3}, 0.02),
        (
            Quantize("w4", embedding=True, head=False),
            {"com.microsoft::GatherBlockQuantized": 1, "com.microsoft::MatMulNBits": 2},
            0.4,
        ),
        (Quantize("int8", keep=("up/*",)), {"MatMulInteger": 2}, 0.06),
        (Quantize("fp16"), {}, 0.005),
    ],
    ids=lambda o: o.form if isinstance(o, Quantize) else "",
)
def test_every_form(
    words: nn.Module, tmp_path: Path, options: Quantize, quantized: dict[str, int], error: float
) -> None:
    samples = [(ids(3, n),) for n in (4, 9)]
    made = gatecc.export(words, tmp_path / "one", (ids(),), quantize=options, evaluation_inputs=samples)
    told = made.quantized
    assert told is not None
    assert told.quantized == quantized
    assert {k: made.operators[k] for k in quantized} == quantized
    assert told.on == "2 inputs of the user"
    assert told.bytes_after < (0.7 if options.form == "fp16" else 0.8) * told.bytes_before
    (accuracy,) = told.accuracy
    session: Any = __import__("onnxruntime").InferenceSession(str(tmp_path / "one" / "model.onnx"))
    pairs = [(words(x).detach(), torch.from_numpy(session.run(None, {"input_ids": x.numpy()})[0])) for (x,) in samples]
    worst = max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in pairs)
    assert 0 < worst < error
    assert accuracy.error == pytest.approx(worst, rel=0.01)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
    assert accuracy.agreement == pytest.approx(same.float().mean().item(), abs=0.03)
    losses = [
        nn.functional.cross_entropy(b[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        for (x,), (_, b) in zip(samples, pairs, strict=True)
    ]
    assert accuracy.bits_after == pytest.approx(sum(losses) / math.log(2) / (3 * 3 + 3 * 8), rel=1e-3)
    manifest = json.loads((tmp_path / "one" / "gatecc.json").read_text())
    assert manifest["quantized"]["options"]["form"] == options.form
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["gatecc.json", "model.onnx", "report.html"]


class Pooled(nn.Module):
    """The mean over tokens that are some, with casts of a mask and a running sum: (B, N, 8), (B, N) -> (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = mask[..., None].to(x.dtype)
        places = mask.float().cumsum(1)[..., None] / 10
        return ((self.inner(x) + places) * kept).sum(1) / kept.sum(1).clamp_min(1)


def test_half_precision_with_masks(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 5, 8), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))
    made = gatecc.export(Pooled().eval(), tmp_path, inputs, quantize="fp16", evaluation_inputs=[inputs])
    assert made.quantized is not None
    assert 0 < made.quantized.accuracy[0].error < 5e-3


def test_the_same_bytes_and_weights_beside(words: nn.Module, tmp_path: Path) -> None:
    made = [gatecc.export(words, tmp_path / n, (ids(),), quantize="w8", external_data=True) for n in ("one", "two")]
    assert made[0].files == made[1].files
    assert sorted(made[0].files) == ["model.onnx", "model.onnx.data"]
    onnx.checker.check_model(str(tmp_path / "one" / "model.onnx"))


def test_what_is_refused(words: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"(?s)'w3'.*w8, w4, int8, fp16"):
        gatecc.export(words, tmp_path / "x", (ids(),), quantize="w3")
    with pytest.raises(ArgumentError, match="target='portable'"):
        gatecc.export(words, tmp_path / "x", (ids(),), quantize="w8", target="portable")
    with pytest.raises(ArgumentError, match="4 bits alone"):
        Quantize("w8", embedding=True)
    with pytest.raises(ArgumentError, match="block"):
        Quantize("w8", block=24)
    for form in ("int8", "fp16"):
        with pytest.raises(ArgumentError, match=f"(?s)has no blocks.*{form}, block 64"):
            Quantize(form, block=64)
    with pytest.raises(ArgumentError, match="not like the example inputs"):
        gatecc.export(words, tmp_path / "x", (ids(),), quantize="w8", evaluation_inputs=[(torch.randn(2, 3),)])
    with pytest.raises(ExportError, match="nothing in this graph can be quantised"):
        gatecc.export(nn.Conv1d(4, 4, 3).eval(), tmp_path / "x", (torch.randn(2, 4, 9),), quantize="w8")
    monkeypatch.setattr(QUANTIZE, "_SLOWER", -1.0)
    with pytest.raises(ExportError, match=r"(?s)slower on this machine.*x at batch"):
        gatecc.export(words, tmp_path / "x", (ids(),), quantize="w8")
    monkeypatch.setattr(QUANTIZE, "_WRONG", 1.1)
    with pytest.raises(ExportError, match=r"(?s)computes something else.*a cosine of"):
        gatecc.export(words, tmp_path / "x", (ids(),), quantize="w8")
    assert list(tmp_path.iterdir()) == []


def test_products_of_every_spelling_are_one(tmp_path: Path) -> None:
    """Gemm with and without a bias and a transposed weight, and a transposed table, are what MatMul computes."""
    from gatecc.codegen.onnx.quantizer import plain_products

    torch.manual_seed(0)
    w, v, b = torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1, name="first"),
        helper.make_node("Gemm", ["h", "v"], ["i"], name="second"),
        helper.make_node("Gemm", ["i", "w", "b"], ["j"], alpha=2.0, name="scaled"),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0], name="turned"),
        helper.make_node("MatMul", ["j", "t"], ["y"], name="tied"),
    ]
    held = [numpy_helper.from_array(t.numpy(), n) for n, t in (("w", w), ("v", v), ("b", b))]
    model = helper.make_model(helper.make_graph(nodes, "main", [x], [y], held), ir_version=10)
    model.opset_import[0].version = 24
    plain_products(model)
    assert [n.op_type for n in model.graph.node] == ["MatMul", "Add", "MatMul", "Gemm", "MatMul"]
    value = torch.randn(3, 4)
    session: Any = __import__("onnxruntime").InferenceSession(model.SerializeToString())
    expected = (2 * ((value @ w.T + b) @ v) @ w + b) @ w.T
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": value.numpy()})[0]), expected)


def test_attention_gives_up_its_products() -> None:
    from gatecc.codegen.onnx.quantizer import plain_products

    torch.manual_seed(0)
    held = {"w": torch.randn(4, 8 + 8 + 4), "b": torch.randn(20)}
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", "sequence", 4]) for n in "xy")
    mask = helper.make_tensor_value_info("mask", onnx.TensorProto.INT32, ["batch", "sequence"])
    options: dict[str, Any] = {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 4], "scale": 0.3}
    node = helper.make_node("Attention", ["x", "w", "b", "mask"], ["y"], domain="com.microsoft", **options)
    weights = [numpy_helper.from_array(t.numpy(), n) for n, t in held.items()]
    graph = helper.make_graph([node], "main", [x, mask], [y], weights)
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    seen = torch.tensor([[1, 1, 1, 0, 0], [1] * 5], dtype=torch.int32)
    given = {"x": torch.randn(2, 5, 4).numpy(), "mask": seen.numpy()}

    def run() -> Any:
        return __import__("onnxruntime").InferenceSession(model.SerializeToString()).run(None, given)[0]

    before = torch.from_numpy(run())
    plain_products(model)
    assert [n.op_type for n in model.graph.node] == ["MatMul", "Split", "MultiHeadAttention"]
    torch.testing.assert_close(torch.from_numpy(run()), before)


def test_ranks_and_masks() -> None:
    a = torch.tensor([1.0, 5.0, 2.0, 9.0])
    assert spearman(a, a.exp()) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    gathered = Gathered("y")
    rows = torch.eye(4) + torch.arange(16.0).reshape(4, 4) / 10
    for row in rows:
        gathered.add(row[None], row[None] * 3, None, None)
    assert gathered.result().ranks == pytest.approx(1.0)
    logits, tokens = torch.randn(1, 4, 5), torch.tensor([[0, 3, 2, 4]])
    padded = Gathered("logits")
    padded.add(logits, logits, tokens, torch.tensor([[0, 1, 1, 1]]))
    expected = nn.functional.cross_entropy(logits[0, 1:3], tokens[0, 2:]).item() / math.log(2)
    assert padded.result().bits_before == pytest.approx(expected)


def test_the_decode_step_too(tmp_path: Path) -> None:
    """Both graphs share one file of weights, and a session generates from it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from gatecc.onnx import Session

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 48}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, max_position_embeddings=64)).eval()
    made = gatecc.export(model, tmp_path / "out", {"input_ids": ids()}, decode=True, quantize="w8", external_data=True)
    graphs = ["decode.onnx", "genai_config.json", "model.onnx", "model.onnx.data"]
    assert sorted(made.files) == ["config.json", *graphs]
    assert made.quantized is not None
    assert list(made.quantized.time) == ["batch 1, sequence 1", "batch 1, sequence 61"]
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < 1.4 * made.quantized.bytes_after
    step = made.quantized.decode
    assert step is not None
    assert made.decode is not None
    assert step.operators["com.microsoft::MatMulNBits"] == made.decode.operators["com.microsoft::MatMulNBits"] == 6
    assert list(step.time) == ["a step behind 63 tokens"]
    session, tokens = Session(tmp_path / "out"), ids(1, 6)
    logits, state = session.prefill(tokens[:, :4])
    logits = torch.cat([logits, session.prefill(tokens[:, 4:], state)[0]], 1)
    expected = model(tokens).logits.detach()
    assert 0 < (logits - expected).abs().max() / expected.abs().max() < 0.05
    assert step.accuracy is not None
    assert 0 < step.accuracy.error < 0.05
    assert step.accuracy.agreement == pytest.approx(made.quantized.accuracy[0].agreement, abs=0.02)


@pytest.mark.parametrize(("form", "product"), [("w4", "com.microsoft::MatMulNBits"), ("int8", "MatMulInteger")])
def test_an_encoder_in_fewer_bits_runs_padded_batches(
    form: str, product: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime as ort
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=48, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    given = {"input_ids": ids(2, 9), "attention_mask": mask}
    monkeypatch.setattr(QUANTIZE, "_SLOWER", 1e9)  # the time of so small a model is no matter here
    made = gatecc.export(model, tmp_path / "x", given, quantize=form)
    assert made.operators[product] >= 4
    assert made.operators["com.microsoft::MultiHeadAttention"] == 1
    session = ort.InferenceSession(tmp_path / "x" / "model.onnx")
    found = torch.from_numpy(session.run(["last_hidden_state"], {n: x.numpy() for n, x in given.items()})[0])
    with torch.no_grad():
        expected = model(**given).last_hidden_state
    rows = mask.bool()
    assert torch.cosine_similarity(found[rows], expected[rows], dim=-1).min() > 0.97
