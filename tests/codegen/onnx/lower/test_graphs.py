"""Whole models: how many nodes a layer takes, and that nothing of it is left as the model spells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import gatecc

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = dict(vocab_size=61, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
LLAMA: dict[str, Any] = dict(intermediate_size=96, num_key_value_heads=2, max_position_embeddings=64)
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        sizes = dict(vocab_size=61, n_embd=64, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False)).eval()
    if kind == "opt":
        more = dict(ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, use_cache=False)
        return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, **more)).eval()
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=96), False).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **LLAMA, use_cache=False)).eval()


@pytest.mark.parametrize(
    ("kind", "nodes"),
    [
        ("llama", 10 + 8),  # of a layer; of the embedding, the first norm, the head, and the numbers of keys
        ("gpt2", 9 + 10),  # here and below positions are added by a node of their own, which is faster
        ("opt", 10 + 11),
    ],
)
def test_a_decoder_has_no_more_nodes_than_one_written_by_hand(kind: str, nodes: int, tmp_path: Path) -> None:
    made = gatecc.export(model(kind), tmp_path / "x", {"input_ids": IDS})
    assert sum(made.operators.values()) <= nodes
    assert made.kept == {}
    assert made.operators["com.microsoft::GroupQueryAttention"] == 1
    written = onnx.load(tmp_path / "x" / "model.onnx").graph.node
    names = [n.name for n in written]
    assert len(set(names)) == len(names)
    assert [n for n in names if n.startswith("model.layers.0.mlp.act_fn/")] or kind != "llama"
    assert not any(n.op_type in ("Transpose", "Concat") for n in written)


def test_an_encoder_takes_its_padding_as_it_comes(tmp_path: Path) -> None:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    mask[1] = 0  # of a sample without tokens torch takes no value
    made = gatecc.export(model("bert"), tmp_path / "x", {"input_ids": IDS, "attention_mask": mask})
    assert made.operators["com.microsoft::Attention"] == 1  # with the products in front of it
    assert sum(made.operators.values()) <= 8 + 11  # of the layer; of the rest, four for samples without tokens
    assert made.kept == {}


def test_padding_of_a_decoder_stays_a_mask(tmp_path: Path) -> None:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    made = gatecc.export(model("llama"), tmp_path / "x", {"input_ids": IDS, "attention_mask": mask})
    assert made.operators["Attention"] == 1
    assert made.operators["RotaryEmbedding"] == 2
    assert "com.microsoft::GroupQueryAttention" not in made.operators
    assert any("GroupQueryAttention if the example inputs hold no padding" in became for became in made.lowered)


def test_a_lowering_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both graphs; what it had done by then is undone, and the rest is lowered."""
    from gatecc.codegen.onnx.lower import GRAPH_LOWERINGS

    def fails(self: Any, subject: Any) -> Any:
        program = subject.program
        program.graph.output_node().args = ((program.placeholders[0],),)
        raise RuntimeError("a fault of its own")
        yield

    monkeypatch.setattr(GRAPH_LOWERINGS["silu"], "lower", fails)
    made = gatecc.export(model("llama"), tmp_path / "x", {"input_ids": IDS}, decode=True)
    (kept,) = made.kept
    assert kept.startswith("silu: the whole graph: the lowering failed and was left out: RuntimeError: a fault")
    assert made.decode is not None
    for operators in (made.operators, made.decode.operators):
        assert operators["com.microsoft::GroupQueryAttention"] == 1
        assert operators["Sigmoid"] == 1
        assert "com.microsoft::QuickGelu" not in operators
