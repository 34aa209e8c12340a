"""export writes a graph that computes what the model does at every size, or nothing at all."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import (
    ArgumentError,
    CaptureError,
    ExampleInputsError,
    ExportError,
    GateccError,
    MissingPackageError,
    UnsupportedModelError,
)
from gatecc.recipes import samples

EXPORT = sys.modules["gatecc.export"]  # the package: the attribute of gatecc is the function of that name
RESIDUAL = gatecc.Gate(gatecc.Residual[...].branch, gatecc.GateSpec("skip", "linear", "element", "sigmoid"))


class Block(nn.Module):
    """One block of attention and feed-forward over ids: (B, N), with an optional mask of the same shape."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **other: Any) -> dict[str, Any]:
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None].bool())
        x = x + self.out(self.drop(y.transpose(1, 2).flatten(2)))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return {"hidden": x, "pooled": (x.mean(1), None)}


class Conv(nn.Module):
    """Images: (B, 3, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.conv(image)
        return maps, maps.mean((2, 3))


def ids(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randint(0, 11, (batch, length))


def count(folder: Path) -> dict[str, int]:
    nodes = [n.op_type for n in onnx.load(folder / "model.onnx").graph.node]
    return {op: nodes.count(op) for op in set(nodes)}


@pytest.fixture(scope="module")
def gated() -> nn.Module:
    """A block with random gates on its attention and on both branches of its residual stream."""
    model = gatecc.transform(Block().eval(), "gated-attention", (ids(),), verify=False)
    model = gatecc.transform(model, RESIDUAL, (ids(),), verify=False)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def test_gates_are_in_the_graph_and_sizes_stay_free(gated: nn.Module, tmp_path: Path) -> None:
    gated.train()
    gated.get_submodule("drop").eval()
    result = gatecc.export(gated, tmp_path / "a" / "b", (ids(1, 5), torch.tensor([[0, 1, 1, 0, 1]])))
    assert gated.training
    assert not gated.get_submodule("drop").training
    assert result.inputs == {"ids": ["batch", "sequence"], "mask": ["batch", "sequence"]}
    assert result.outputs == {"hidden": ["batch", "sequence", 16], "pooled_0": ["batch", 16]}
    assert [(c.sizes["batch"], c.sizes["sequence"], c.padding) for c in result.compared] == [
        *((1, 5, ""), (3, 5, ""), (1, 8, ""), (3, 8, "")),
        *((1, 1, ""), (3, 7, ""), (1, 131, "")),
        *((3, 5, "left"), (3, 5, "right")),
    ]
    assert max(c.error for c in result.compared) < 1e-5
    assert count(tmp_path / "a" / "b")["Sigmoid"] == result.operators["Sigmoid"] == 3
    assert result.notes == ()


def test_what_the_files_hold(gated: nn.Module, tmp_path: Path) -> None:
    result = gatecc.export(gated, tmp_path / "one", (ids(),))
    again = gatecc.export(gated, tmp_path / "two", (ids(3, 4),), verify=False)
    assert again.notes == ("not compared",)
    assert again.compared == ()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["gatecc.json", "model.onnx", "report.html"]
    assert result.files == again.files  # the same bytes, whatever the example was
    data = (tmp_path / "one" / "model.onnx").read_bytes()
    for secret in (str(tmp_path), str(Path(torch.__file__).parent), __file__, "stack_trace"):
        assert secret.encode() not in data
    model = onnx.load_from_string(data)
    assert model.ir_version == 10
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24), ("com.microsoft", 1)]
    typed = {v.name for v in (*model.graph.value_info, *model.graph.output) if v.type.tensor_type.HasField("shape")}
    assert {name for node in model.graph.node for name in node.output} <= typed
    assert "qkv.bias" in {i.name for i in model.graph.initializer}
    assert {p.key: p.value for p in model.metadata_props}["gatecc.recipe"] == "gated-attention, custom"
    manifest = json.loads((tmp_path / "one" / "gatecc.json").read_text())
    assert manifest["dims"] == ["batch", "sequence"]
    assert manifest["files"] == result.files
    assert len(manifest["compared"]) == 7
    assert [s["recipe"] for s in manifest["steps"]] == ["gated-attention", "custom"]
    assert manifest["steps"][0]["sites"] == ["#0"]


def test_float64_and_float16(tmp_path: Path) -> None:
    for dtype, bar in ((torch.float64, 1e-12), (torch.float16, 1e-2)):
        result = gatecc.export(nn.Linear(4, 4, dtype=dtype), tmp_path, (torch.randn(2, 3, 4, dtype=dtype),))
        assert max(c.error for c in result.compared) < bar


def test_images_and_positional_outputs(tmp_path: Path) -> None:
    result = gatecc.export(Conv(), tmp_path, (torch.randn(1, 3, 8, 8),))
    assert result.inputs == {"image": ["batch", 3, "height", "width"]}
    assert list(result.outputs) == ["output_0", "output_1"]
    assert len(result.compared) == 4


def test_transformers_without_a_cache(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).eval()
    model = gatecc.transform(base, "gated-attention", dict(input_ids=ids()), verify=False)
    nn.init.normal_(model.get_parameter("model.layers.0.self_attn.gate.weight"))
    inputs = dict(input_ids=ids(1), attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    result = gatecc.export(model, tmp_path, inputs)
    assert result.inputs == {name: ["batch", "sequence"] for name in inputs}
    assert list(result.outputs) == ["logits"]
    assert "past_key_values" in model(**inputs)  # the cache is back
    assert result.operators["Sigmoid"] == 1  # the gate
    assert result.operators["com.microsoft::QuickGelu"] == 1  # the SiLU


# --- nothing is written -----------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Depends on how often it was called: a graph holds the count of its capture."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) + self.calls


class Branching(Counting):
    """A branch on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Determinant(Counting):
    """An operator that torch.onnx does not know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x @ x.mT).real


X = torch.ones(2, 4, 4)
FAILURES: dict[str, tuple[Callable[[], nn.Module], Any, type[GateccError], str]] = {
    "another result": (
        Counting,
        (X,),
        ExportError,
        r"(?s)output at batch 1, sequence 4.*does not compute.*verify=False",
    ),
    "a branch": (Branching, (X,), CaptureError, "Branching"),
    "no ONNX form": (Determinant, (X,), ExportError, r"test_export.py:\d+: aten.linalg_eig.*"),
    "unfolded": (  # ONNX Runtime makes Erf of Gelu, has none for float64 and names no node
        lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()).double(),
        (X.double(),),
        ExportError,
        r"aten.gelu: ONNX Runtime does not load",
    ),
    "bfloat16": (lambda: Counting().bfloat16(), (X.bfloat16(),), ExportError, "bfloat16"),
    "compiled": (lambda: _compiled(), (X,), UnsupportedModelError, r"(?s)linear.*_orig_mod"),
    "compiled in place": (lambda: _compiled_in_place(), (X,), UnsupportedModelError, "then compile"),
    "wrong inputs": (Counting, (torch.ones(2, 5),), ExampleInputsError, "does not run"),
    "a bare tensor": (Counting, X, ExampleInputsError, "tuple"),
    "an object": (Block, (ids(), None, {"x": object()}), ExampleInputsError, "object"),
}


def _compiled() -> nn.Module:
    model = Counting()
    model.linear = torch.compile(model.linear, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _compiled_in_place() -> nn.Module:
    model = Counting()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(("make", "inputs", "error", "told"), FAILURES.values(), ids=FAILURES)
def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, make: Callable[[], nn.Module], inputs: Any, error: type[GateccError], told: str
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.onnx").write_text("old")
    with pytest.raises(error, match=told):
        gatecc.export(make(), folder, inputs)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "model.onnx"]
    assert (folder / "model.onnx").read_text() == "old"


def test_a_refusal_prints_no_graph(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Repeating(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(int(x.sum())):
                x = self.linear(x)
            return x

    with pytest.raises(CaptureError):
        gatecc.export(Repeating().eval(), tmp_path / "x", (X,))
    assert "def forward" not in "".join(capfd.readouterr())


def test_an_existing_folder_keeps_what_is_not_ours(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.onnx", "model.onnx.data"):
        (tmp_path / name).write_text("old")
    gatecc.export(nn.Linear(4, 4), tmp_path, (X,))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gatecc.json", "model.onnx", "report.html", "tokenizer.json"]
    onnx.checker.check_model(str(tmp_path / "model.onnx"))


def test_large_weights_get_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatecc.codegen.onnx.build.EXTERNAL", 1000)
    result = gatecc.export(nn.Linear(64, 64), tmp_path / "big", (torch.randn(2, 64),))
    assert sorted(result.files) == ["model.onnx", "model.onnx.data"]
    graph, weights = ((tmp_path / "big" / name).stat().st_size for name in sorted(result.files))
    assert graph < 4 * 64 * 64 <= weights


def test_weights_beside_on_request_and_compared_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatecc.codegen.onnx.build.APART", -1)
    inputs = (torch.randn(2, 64),)
    beside = gatecc.export(nn.Linear(64, 64), tmp_path / "beside", inputs, external_data=True)
    assert sorted(beside.files) == ["model.onnx", "model.onnx.data"]
    assert [c.sizes for c in beside.compared] == [{"batch": 1}, {"batch": 3}]
    assert max(c.error for c in beside.compared) < 1e-6
    with pytest.raises(ExportError, match=r"(?s)aten.gelu: ONNX Runtime does not load.*NotImplemented"):
        gatecc.export(nn.Sequential(nn.GELU()).double(), tmp_path / "x", (X.double(),))


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(EXPORT, "compare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gatecc.export(nn.Linear(4, 4), tmp_path / "x", (X,))
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_must_be_one(tmp_path: Path) -> None:
    class Single(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.squeeze(0).reshape(-1, 4))[None]

    result = gatecc.export(Single(4, 4), tmp_path, (torch.randn(1, 5, 4),))
    assert result.inputs == {"input": [1, "sequence", 4]}
    assert [c.sizes["sequence"] for c in result.compared] == [5, 8, 1, 7, 131]
    assert "batch size is fixed at 1" in result.notes[0]


def test_bad_opset(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="26"):
        gatecc.export(nn.Linear(4, 4), tmp_path, (X,), opset=26)


@pytest.mark.parametrize(("package", "verify"), [("onnxscript", False), ("onnx", True)])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, verify: bool
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"(?s){package}.*gatecc\[onnx,ort\]"):
        gatecc.export(nn.Linear(4, 4), tmp_path / "x", (X,), verify=verify)
    assert not (tmp_path / "x").exists()


def test_without_onnx_runtime_the_graph_is_written_uncompared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    made = gatecc.export(nn.Linear(4, 4), tmp_path, (X,), opset=21, verify=False)
    assert (made.notes, made.minimal_runtime) == (("not compared",), "1.18")  # the first that loads IR version 10


# --- what may be returned, what is given up, what is stopped ----------------------------------------------------------


@dataclass
class Output:
    """A class of outputs that pytree does not know. Its entries have the names of ONNX nodes."""

    mul: torch.Tensor
    linear: torch.Tensor | None = None
    count: int = 3


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Output:
        return Output((self.linear(x) * 3) + x, x * 2)


def test_outputs_of_any_class_keep_their_names(tmp_path: Path) -> None:
    made = gatecc.export(Named(), tmp_path, (X,))
    assert list(made.outputs) == ["mul", "linear"]
    assert made.notes == ("not a tensor, left out of the outputs: count (int)",)
    assert "linear.bias" in {i.name for i in onnx.load(tmp_path / "model.onnx").graph.initializer}


def test_height_and_width_are_given_up_where_they_take_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EXPORT, "_IMAGE_SIDES", 1e-3)
    made = gatecc.export(Conv(), tmp_path, (torch.randn(2, 3, 8, 8),))
    assert made.inputs == {"image": ["batch", 3, 8, 8]}
    assert made.notes[0].startswith("height and width of images stay as in the example")
    assert [c.sizes["batch"] for c in made.compared] == [1, 3]


def test_an_export_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    threads = threading.active_count()
    with pytest.raises(ExportError, match=r"(?s)stopped.*more than 0\.1 s of CPU time.*timeout="):
        gatecc.export(Block().eval(), tmp_path / "x", (ids(),), timeout=0.1)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
    with pytest.raises(ArgumentError, match="timeout"):
        gatecc.export(Block().eval(), tmp_path / "x", (ids(),), timeout=0)


def test_what_nobody_foresaw_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("SymInt at index 1")

    monkeypatch.setattr(EXPORT, "build", broken)
    with pytest.raises(ExportError, match=r"(?s)SymInt at index 1.*do"):
        gatecc.export(nn.Linear(4, 4), tmp_path / "x", (X,))


@pytest.mark.parametrize("group", [True, False])
def test_experts_that_copy_a_matrix_per_token_are_grouped(group: bool, tmp_path: Path) -> None:
    model, inputs = samples.mixture()
    config: Any = model.config
    config._experts_implementation = "batched_mm"
    made = gatecc.export(model, tmp_path / "out", inputs, group_experts=group)
    assert any("batched_mm" in note for note in made.notes) is group
    assert (made.operators.get("Gemm", 0) >= 8) is group  # two products of each of four experts
    assert config._experts_implementation == "batched_mm"
