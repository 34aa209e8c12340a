"""Files beside the graph: a folder that optimum and sentence-transformers load an encoder from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.export.beside import write_beside

ort: Any = pytest.importorskip("onnxruntime")
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "gate", "is", "open", "or", "shut")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sentence-transformers: an encoder, its tokenizer, and the mean of tokens."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.BertConfig(vocab_size=len(WORDS), num_attention_heads=2, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer: Any = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_input_names=names
    )
    wrapped.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}, {"idx": 2, "path": "../elsewhere"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_an_encoder_is_found_by_its_usual_names(source: Path, tmp_path: Path) -> None:
    """As ORTModelForFeatureExtraction of optimum does it: the config and the tokenizer by transformers, model.onnx,
    those inputs of the tokenizer that the graph has, last_hidden_state."""
    model = transformers.BertModel.from_pretrained(source).eval()
    folder = tmp_path / "out"
    (folder / "1_Pooling").mkdir(parents=True)  # from an earlier export, as are these
    for name in ("decode.onnx", "genai_config.json"):
        (folder / name).touch()
    texts = transformers.AutoTokenizer.from_pretrained(source)
    made = gatecc.export(model, folder, dict(texts(["a gate is", "or gate open"], return_tensors="pt")))
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert written == {*made.files, "gatecc.json", "report.html"}
    assert {"model.onnx", "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"} <= written
    assert not {"decode.onnx", "genai_config.json"} & written
    assert str(source) not in (folder / "config.json").read_text()
    loaded = transformers.AutoConfig.from_pretrained(folder)
    assert (type(loaded).__name__, loaded.architectures) == ("BertConfig", ["BertModel"])
    tokenizer, session = transformers.AutoTokenizer.from_pretrained(folder), ort.InferenceSession(folder / "model.onnx")
    batch = tokenizer(["a gate is open or shut", "is a gate"], padding=True, return_tensors="pt")
    assert {i.name for i in session.get_inputs()} == {"input_ids", "attention_mask", "token_type_ids"} == set(batch)
    (hidden,) = session.run(["last_hidden_state"], {name: x.numpy() for name, x in batch.items()})
    expected = model(**batch).last_hidden_state.detach()
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(hidden)[seen], expected[seen], rtol=0, atol=1e-5)


def test_where_a_tokenizer_comes_from(source: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for number, given in enumerate((tokenizer, source, str(source))):
        write_beside(nn.Linear(2, 2), tmp_path / str(number), given)
        assert (tmp_path / str(number) / "tokenizer.json").exists()
    write_beside(nn.Linear(2, 2), tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())
    with pytest.raises(ArgumentError, match="no tokenizer in this folder"):
        write_beside(nn.Linear(2, 2), tmp_path / "a", tmp_path / "none")
    with pytest.raises(ArgumentError, match="no folder"):
        write_beside(nn.Linear(2, 2), tmp_path / "b", "no/such/folder")
    with pytest.raises(ArgumentError, match="this is no tokenizer"):
        write_beside(nn.Linear(2, 2), tmp_path / "c", 3)
