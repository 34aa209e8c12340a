"""The exported graph: its nodes, and its latency in ONNX Runtime beside torch.onnx's graph and an expert's.

``python benchmarks/onnx_export.py [--check]``; ``GATECC_ONLY=llama`` limits it to rows whose name holds the word.
The baseline is torch.onnx.export at opset 24 with all of ONNX Runtime's optimisations; the expert is the builder of
onnxruntime-genai on the same weights, where it is installed. One thread, CPU time, side by side, best of several.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from _onnx_references import Chunks, Operator, contrib_mixture, mixture
from _table import Row, best_of, main
from torch import Tensor, nn

import gatecc

LLAMA: dict[str, Any] = dict(vocab_size=1000, num_hidden_layers=6, max_position_embeddings=4096, use_cache=False)
WINDOW = 16  # tokens
KNOWN = {"llama 6 x 512": 64, "mistral": 32, "qwen3": 32, "gemma2": 32, "phi": 64}  # to the expert; channels of a head
BARS = {"opt": 0.40, "liger": 0.45}
ERROR = 1e-5  # of results that are raced
REPEATS = {1: 60, 16: 60, 128: 8, 512: 4, 2048: 3}


def llama(width: int = 512, **sizes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = width >= 512
    shape: dict[str, Any] = dict(hidden_size=width, intermediate_size=1376 if wide else 4 * width)
    heads: dict[str, Any] = dict(num_attention_heads=8 if wide else 4, num_key_value_heads=4 if wide else 2)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **shape, **heads, **sizes}))


def gated() -> nn.Module:
    return gatecc.transform(llama(128), "gated-attention", {"input_ids": ids(2, 7)}, verify=False)


def liger() -> nn.Module:
    """A llama whose norms are one operator, as Liger's kernels have it."""
    model = llama(128)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module).__name__ == "LlamaRMSNorm":
            weight, epsilon = module.weight, module.variance_epsilon
            module.forward = partial(_rms_norm, weight, epsilon)
    return model


def _rms_norm(weight: Tensor, epsilon: float, x: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


def other(kind: str) -> nn.Module:
    """A small model of six layers."""
    import transformers as T

    grouped: dict[str, Any] = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)
    if kind == "mistral":
        return T.MistralForCausalLM(T.MistralConfig(**LLAMA, **grouped, sliding_window=WINDOW))
    if kind == "qwen3":
        return T.Qwen3ForCausalLM(T.Qwen3Config(**LLAMA, **grouped, head_dim=32))
    if kind == "gemma2":
        config = T.Gemma2Config(**LLAMA, **grouped, head_dim=32, sliding_window=WINDOW)
        config._attn_implementation = "eager"
        return T.Gemma2ForCausalLM(config)
    if kind == "phi":
        return T.PhiForCausalLM(T.PhiConfig(**LLAMA, hidden_size=256, intermediate_size=384, num_attention_heads=4))
    if kind == "gpt2":
        sizes: dict[str, Any] = dict(vocab_size=1000, n_embd=128, n_layer=6, n_head=4, n_positions=512, use_cache=False)
        return T.GPT2LMHeadModel(T.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))
    narrow = dict(hidden_size=128, ffn_dim=384, word_embed_proj_dim=128, num_attention_heads=4)
    opt: dict[str, Any] = {**LLAMA, **narrow, "max_position_embeddings": 512}
    return T.OPTForCausalLM(T.OPTConfig(**opt))


def minilm() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = dict(
        vocab_size=1000, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    return BertModel(BertConfig(**sizes), add_pooling_layer=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama 6 x 512": llama,
    **{kind: partial(other, kind) for kind in ("mistral", "qwen3", "gemma2", "phi", "gpt2", "opt")},
    "gated llama": gated,
    "liger llama": liger,
}


def trained(model: nn.Module) -> nn.Module:
    """With biases that are not zero: the builder leaves out those that are."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.02)
    return model


def ids(batch: int, length: int, high: int = 1000) -> Tensor:
    return torch.randint(0, high, (batch, length), generator=torch.Generator().manual_seed(0))


# --- graphs -----------------------------------------------------------------------------------------------------------


def exported(model: nn.Module, inputs: dict[str, Tensor], folder: Path, **options: Any) -> Path:
    gatecc.export(model, folder, inputs, **options)
    return folder / "model.onnx"


def baseline(model: nn.Module, inputs: Mapping[str, Tensor], folder: Path) -> Path:
    """torch.onnx's graph at opset 24; the first two axes of each input are free."""
    folder.mkdir(parents=True)
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in inputs}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            model, (), kwargs=dict(inputs), dynamo=True, opset_version=24, dynamic_shapes=free, verbose=False
        )
    assert made is not None
    made.save(str(folder / "model.onnx"))
    return folder / "model.onnx"


def expert(model: Any, folder: Path) -> Path | None:
    """The graph of onnxruntime-genai's builder; None if it is not there, or does not know the model."""
    try:
        from onnxruntime_genai.models.builder import create_model, parse_extra_options
    except ImportError:
        return None
    source = folder / "source"
    model.save_pretrained(source)
    _tokenizer(model.config.vocab_size).save_pretrained(source)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            given = None, str(source), str(folder / "made"), "fp32", "cpu", str(folder / "cache")
            create_model(*given, **parse_extra_options(*given, []))
        except Exception as e:
            print(f"no expert: {type(e).__name__}: {e}", file=sys.stderr)
            return None
    return folder / "made" / "model.onnx"


def _tokenizer(size: int) -> Any:
    """Of numbers: the builder wants one, whatever it is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token="1")


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def nodes(path: Path, *, optimised: bool = True) -> int:
    """Of the graph as it is written, or after all of ONNX Runtime's optimisations."""
    if optimised:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(path.parent / "optimised.onnx")
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        path = path.parent / "optimised.onnx"
    return len(onnx.load(path, load_external_data=False).graph.node)


def feeds(made: ort.InferenceSession, inputs: Mapping[str, Any], head: int) -> dict[str, Any]:
    """What a graph takes of these inputs; caches are empty, of heads of so many channels. A cache that goes round (the
    builder's, behind a window) has the length of the window from the start."""
    given: dict[str, Any] = {}
    batch, length = next(iter(inputs.values())).shape[:2]
    for i in made.get_inputs():
        if i.name in inputs:
            given[i.name] = np.asarray(inputs[i.name])
        elif i.name == "attention_mask":
            given[i.name] = np.ones((batch, length), np.int64)
        else:
            room = WINDOW if i.shape[2] == "past_sliding_length" else 0
            given[i.name] = np.zeros((batch, i.shape[1], room, head), np.float32)
    return given


def ratios(
    ours: Path, others: Mapping[str, Path], inputs: Mapping[str, Any], repeats: int, head: int = 0
) -> dict[str, float]:
    """The CPU time of our graph over that of each other one."""
    made = {name: session(path) for name, path in {"": ours, **others}.items()}
    works = [partial(s.run, None, feeds(s, inputs, head)) for s in made.values()]
    for work in works:
        work()
    first, *rest = best_of(*works, repeats=repeats)
    return {name: first / seconds for name, seconds in zip(others, rest, strict=True)}


# --- rows -------------------------------------------------------------------------------------------------------------


def decoders(folder: Path, only: str) -> Iterator[Row]:
    """Nodes of all, latency of the llama."""
    for name, make in MODELS.items():
        if only not in name:
            continue
        torch.manual_seed(0)
        model, at = trained(make().eval()), folder / name.replace(" ", "_")
        inputs = {"input_ids": ids(2, 7)}
        ours, theirs = exported(model, inputs, at / "ours"), baseline(model, inputs, at / "theirs")
        bar = next((b for word, b in BARS.items() if word in name), 0.30)
        if name == "llama 6 x 512":
            yield Row(f"{name}: nodes", nodes(ours, optimised=False), 75)
        yield Row(f"{name}: nodes over the exporter's", nodes(ours) / nodes(theirs), bar)
        if name in KNOWN:
            yield from latency(name, ours, theirs, expert(model, at))


def latency(name: str, ours: Path, theirs: Path, by_hand: Path | None) -> Iterator[Row]:
    others = {"exporter": theirs, **({"expert": by_hand} if by_hand is not None else {})}
    if by_hand is not None:
        yield Row(f"{name}: nodes of the expert", nodes(by_hand, optimised=False))
    small = 1 if name == "llama 6 x 512" else 4
    for length, bar in ((1, 1.0), (128, 1.0), (512, 0.98)):
        found = ratios(ours, others, {"input_ids": ids(1, length).numpy()}, small * REPEATS[length], KNOWN[name])
        for other_name, ratio in found.items():
            limit = 1.04 if other_name == "expert" else bar if small == 1 else None
            yield Row(f"{name}, {length} tokens: time over the {other_name}'s", ratio, limit)


def small(folder: Path, only: str) -> Iterator[Row]:
    name = "llama 2 x 64"
    if only in name:
        model, inputs = llama(64, num_hidden_layers=2).eval(), {"input_ids": ids(2, 7)}
        ours, theirs = exported(model, inputs, folder / "s" / "a"), baseline(model, inputs, folder / "s" / "b")
        found = ratios(ours, {"exporter": theirs}, {"input_ids": ids(1, 16).numpy()}, 200)
        yield Row(f"{name}, 16 tokens: time over the exporter's", found["exporter"], 0.65)


def encoder(folder: Path, only: str) -> Iterator[Row]:
    name = "minilm"
    if only not in name:
        return
    torch.manual_seed(0)
    inputs = {"input_ids": ids(8, 64), "attention_mask": torch.ones(8, 64, dtype=torch.int64)}
    inputs["attention_mask"][::2, 40:] = 0
    model = minilm().eval()
    ours, theirs = exported(model, inputs, folder / "m" / "a"), baseline(model, inputs, folder / "m" / "b")
    yield Row(f"{name}: nodes over the exporter's", nodes(ours) / nodes(theirs), 0.40)
    found = ratios(ours, {"exporter": theirs}, {k: v.numpy() for k, v in inputs.items()}, 20)
    yield Row(f"{name}, 8 x 64 tokens: time over the exporter's", found["exporter"], 1.0)


def experts(folder: Path, only: str) -> Iterator[Row]:
    """The mixture of experts of Mixtral beside transformers' form that torch.onnx can export, and the contrib node."""
    name = "experts, 2 of 8"
    if only not in name:
        return
    torch.manual_seed(0)
    block, x = mixture(), torch.randn(2, 7, 256)
    ours = exported(block, {"hidden_states": x}, folder / "e" / "a")
    others = {
        "batched_mm": baseline(block, {"hidden_states": x}, folder / "e" / "b"),
        "com.microsoft.MoE": contrib_mixture(block, folder / "e" / "c"),
    }
    for tokens, bars in ((1, {}), (64, {"batched_mm": 1 / 12, "com.microsoft.MoE": 0.75})):
        given = {"hidden_states": torch.randn(1, tokens, 256).numpy()}
        results = [np.asarray(session(path).run(None, given)[0]) for path in (ours, *others.values())]
        error = max(float(np.abs(other - results[0]).max()) for other in results[1:])
        assert error < ERROR, error
        for other, ratio in ratios(ours, others, given, REPEATS[128] * (10 if tokens == 1 else 1)).items():
            yield Row(f"{name}, {tokens} tokens: time over {other}'s", ratio, bars.get(other))


def linear(folder: Path, only: str) -> Iterator[Row]:
    """Gated linear attention, 8 heads of 64, beside the forms in plain operators that torch.onnx can write."""
    name = "linear attention"
    if only not in name:
        return
    inputs = _mixed(2, 130)
    ours = exported(Operator(8), inputs, folder / "l" / "a")
    forms = {
        f"{kind} {chunk}": Chunks(8, chunk, scanned=kind == "scan") for kind in ("scan", "all") for chunk in (32, 64)
    }
    others = {name: baseline(form, inputs, folder / "l" / str(i)) for i, (name, form) in enumerate(forms.items())}
    for tokens in (512, 2048):
        given = {name: x.numpy() for name, x in _mixed(1, tokens).items()}
        results = [np.asarray(session(path).run(None, given)[0]) for path in (ours, *others.values())]
        error = max(float(np.abs(other - results[0]).max()) for other in results[1:])
        assert error < 1e-4, error
        found = ratios(ours, others, given, 2 * REPEATS[tokens])
        for chunk, bar in ((32, 0.75), (64, None)):  # of 64 tokens exp(-sum) overflows at half the decay
            best = max((form for form in found if str(chunk) in form), key=found.__getitem__)
            yield Row(f"{name}, {tokens} tokens: time over the exporter's chunks of {chunk}", found[best], bar)


def _mixed(batch: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = torch.randn(4, batch, tokens, 512, generator=generator).unbind()
    return {"q": q, "k": k, "v": v, "g": F.logsigmoid(g + 4)}


def measure() -> Iterator[Row]:
    """The rows of the benchmark, each as soon as it is known."""
    only = os.getenv("GATECC_ONLY", "")
    with tempfile.TemporaryDirectory() as folder:
        for part in (decoders, small, encoder, experts, linear):
            for row in part(Path(folder), only):
                print(f"{row.what}: {row.figure:.3f}", flush=True)
                yield row


if __name__ == "__main__":
    main("onnx_export", lambda: list(measure()))
