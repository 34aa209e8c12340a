"""The recipe travels in a folder of ``save_pretrained``, and ``gatecc.load`` makes the model from the folder."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import CheckpointError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.site import Site
from gatecc.transform import history

transformers = pytest.importorskip("transformers")
IDS = torch.randint(3, 60, (2, 9))


def _llama(**options: Any) -> nn.Module:
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, **options)
    return transformers.LlamaForCausalLM(config).eval()


def _moved(model: nn.Module, recipe: Any, inputs: Any = (IDS,)) -> Any:
    result = gatecc.transform(model, recipe, inputs, verify=False)
    with torch.no_grad():
        for p in result.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return result


def _same(a: Any, b: Any) -> bool:
    with torch.no_grad():
        return torch.equal(a(IDS, use_cache=False).logits, b(IDS, use_cache=False).logits)


@pytest.fixture(scope="module")
def gated() -> Any:
    return _moved(_llama(tie_word_embeddings=True), "gated-attention")


def test_the_folder_alone_is_enough(gated: Any, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path)
    loaded = gatecc.load(tmp_path)
    assert _same(loaded, gated)
    assert not loaded.training
    assert [step.recipe.name for step in history(loaded)] == ["gated-attention"]
    assert loaded.get_parameter("lm_head.weight") is loaded.get_parameter("model.embed_tokens.weight")
    assert _same(gatecc.load(_llama(tie_word_embeddings=True), tmp_path), gated)


def test_shards_and_a_folder_of_save(gated: Any, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path / "a", max_shard_size="10KB")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    assert _same(gatecc.load(tmp_path / "a"), gated)
    gatecc.save(gated, tmp_path / "b")
    loaded: Any = gatecc.load(tmp_path / "b")
    assert _same(loaded, gated)
    assert loaded.generation_config.to_dict() == gated.generation_config.to_dict()


@pytest.mark.parametrize("options", [{"init": "identity(how=fold)"}, {"fuse_into": "q"}], ids=["scaled", "widened"])
def test_weights_of_the_model_that_a_recipe_changes(options: dict[str, Any], tmp_path: Path) -> None:
    model = _moved(_llama(), gatecc.recipe("gated-attention", **options))
    model.save_pretrained(tmp_path)
    loaded = gatecc.load(tmp_path)
    assert _same(loaded, model)
    assert _same(gatecc.revert(loaded), gatecc.revert(model))


@dataclass(frozen=True)
class Slim(gatecc.Rewrite):
    """A feed-forward layer without its gate, the rows of what stays in two parts."""

    name = "slim"

    def contract(self) -> Contract:
        return changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None:
        (up,) = edit.program.readers(site.weights["up"].fqn)
        hidden = site.values["hidden"].node
        first, second = edit.split(site.weights["up"].fqn, (12, 20), name="rows")
        edit.replace(hidden, edit.call(_in_parts, up.args[0], first, second))
        edit.discard(hidden, inside=True)
        edit.drop(site.weights["gate"].fqn.removesuffix(".weight"))


def _in_parts(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return torch.cat([x @ first.mT, x @ second.mT], -1)


def test_weights_that_left_the_model_come_back_with_it(tmp_path: Path) -> None:
    plain = _llama()
    model = _moved(plain, Slim(gatecc.MLP[...]))
    assert "model.layers.0.mlp.gate_proj.weight" not in model.state_dict()
    model.save_pretrained(tmp_path)
    loaded = gatecc.load(tmp_path)
    assert _same(loaded, model)
    back = gatecc.revert(loaded)
    assert _same(back, gatecc.revert(model))
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(back.get_parameter(gate), plain.get_parameter(gate))


def test_eager_attention_in_bfloat16(tmp_path: Path) -> None:
    base = _llama()
    base.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    model = _moved(base.to(torch.bfloat16), "gated-attention")
    model.save_pretrained(tmp_path)
    assert _same(gatecc.load(tmp_path), model)


def test_copies_and_pickles_save_themselves(gated: Any, tmp_path: Path) -> None:
    for other in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        with torch.no_grad():
            other.model.norm.weight.add_(1)
        other.save_pretrained(tmp_path)
        assert _same(gatecc.load(tmp_path), other)
        assert not _same(other, gated)


def test_a_reverted_model_saves_as_ever(gated: Any, tmp_path: Path) -> None:
    plain: Any = gatecc.revert(gated)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "recipe.json").exists()
    assert _same(transformers.LlamaForCausalLM.from_pretrained(tmp_path), plain)


def test_a_save_that_fails_leaves_no_recipe(gated: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard"):
        gated.save_pretrained(tmp_path, max_shard_size="nonsense shard size")
    assert not (tmp_path / "recipe.json").exists()
    assert not list(tmp_path.glob("new*"))


def test_an_upload_without_the_recipe_is_refused(gated: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.push_to_hub"):
        gated.save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())


def test_other_processes_write_nothing(gated: Any, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "recipe.json").exists()


def test_weights_that_are_gone_are_named(gated: Any, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="from_pretrained cannot read"):
        gatecc.load(tmp_path)


def test_a_class_of_another_library_is_not_imported_by_a_file(gated: Any, tmp_path: Path) -> None:
    gated.save_pretrained(tmp_path)
    head = tmp_path / "recipe.json"
    head.write_text(head.read_text().replace("transformers.models.llama", "antigravity.models.llama"))
    with pytest.raises(CheckpointError, match=r"gatecc\.load\(model, folder\)"):
        gatecc.load(tmp_path)
    assert _same(gatecc.load(_llama(tie_word_embeddings=True), tmp_path), gated)


def test_a_model_with_adapters_writes_what_is_new_beside_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = _llama()
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=["o_proj"]))
    model = gatecc.transform(adapted, "gated-attention", {"input_ids": IDS}, verify=False).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name or ".gate." in name:
                p.add_(torch.randn_like(p))
    model.save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    again = gatecc.load(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(CheckpointError, match="holds only what is new"):
        gatecc.load(tmp_path)
