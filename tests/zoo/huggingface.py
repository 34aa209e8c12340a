"""Transformers architectures, tiny and built from configs: nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.zoo.spec import LENGTH, VOCAB, Case, Inputs, Spec, noise, padding, tokens

Kind = Literal["decoder", "encoder", "seq2seq", "image", "clip", "speech"]
Options = dict[str, Any]

IDS: Options = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LAYERS: Options = dict(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)
TEXT: Options = IDS | LAYERS | dict(intermediate_size=128, max_position_embeddings=128)
GROUPED: Options = TEXT | dict(num_key_value_heads=2)
VISION: Options = LAYERS | dict(intermediate_size=128, image_size=32, patch_size=8)
MOE: Options = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
BOTH = ("sdpa", "eager")
EAGER = ("eager",)  # transformers has no SDPA path for these

GPT: Options = IDS | dict(n_embd=64, n_layer=2, n_head=4, n_positions=128)
T5: Options = IDS | dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
BART_SIZES: Options = IDS | dict(
    d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128
)
BART_HEADS: Options = dict(encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=128)
BART: Options = BART_SIZES | BART_HEADS | dict(decoder_start_token_id=2)
WHISPER: Options = BART | dict(num_mel_bins=16, max_source_positions=32, max_target_positions=128)
SWIN: Options = dict(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
CLIP: Options = dict(
    projection_dim=32,
    text_config=TEXT | dict(max_position_embeddings=64),
    vision_config=VISION,
)
SAM: Options = dict(
    vision_config=VISION
    | dict(output_channels=32, num_pos_feats=16, window_size=2, global_attn_indexes=[1], mlp_dim=128),
    prompt_encoder_config=dict(
        hidden_size=32, image_size=32, patch_size=8, mask_input_channels=4, image_embedding_size=4
    ),
    mask_decoder_config=dict(hidden_size=32, num_attention_heads=4, mlp_dim=64, iou_head_hidden_dim=32),
)
SEGFORMER: Options = dict(
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[32, 64],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[2, 4],
    mlp_ratios=[2, 2],
)
DEEPSEEK: Options = dict(
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
)

SEQ2SEQ = "bidirectional,bidirectional" + ",causal,bidirectional" * 2  # two encoder layers, two of self and cross
MASK: dict[Kind, str] = {"decoder": "causal", "seq2seq": SEQ2SEQ, "speech": SEQ2SEQ}


@dataclass(frozen=True)
class Entry:
    """One row of the table: an Auto class of transformers and the options of its config."""

    name: str
    config: str
    kind: Kind
    options: Options
    cores: int = 2
    others: int = 0
    mask: str | None = None
    impls: tuple[str, ...] = BOTH
    auto: str = ""
    make: Callable[[int, int], Inputs] | None = None
    notes: str = ""
    case: Options = field(default_factory=Options)

    def specs(self) -> list[Spec]:
        mask = self.mask or MASK.get(self.kind, "bidirectional")
        return [
            Spec(self.name, "hf", impl, _factory(self, impl), self.cores, self.others, mask, self.notes)
            for impl in self.impls
        ]


def _ids(batch: int, length: int) -> Inputs:
    return Inputs((), {"input_ids": tokens(batch, length)})


def _pair(batch: int, length: int) -> Inputs:
    """Encoder and decoder lengths differ, so that a cross-attention is never square."""
    return Inputs((), {"input_ids": tokens(batch, length), "decoder_input_ids": tokens(batch, length - 4, seed=1)})


def _pixels(batch: int, _: int) -> Inputs:
    return Inputs((), {"pixel_values": noise(batch, 3, 32, 32)})


def _image_and_text(batch: int, length: int) -> Inputs:
    return Inputs((), {"input_ids": tokens(batch, length), "pixel_values": noise(batch, 3, 32, 32)})


def _speech(batch: int, length: int) -> Inputs:
    return Inputs((), {"input_features": noise(batch, 16, 64), "decoder_input_ids": tokens(batch, length)})


def _padded(batch: int, length: int) -> Inputs:
    return Inputs((), {"input_ids": tokens(batch, length), "attention_mask": padding(batch, length).long()})


def _left_padded(batch: int, length: int) -> Inputs:
    mask = padding(batch, length, left=True).long()
    return Inputs((), {"input_ids": tokens(batch, length), "attention_mask": mask})


AUTO: dict[Kind, tuple[str, Callable[[int, int], Inputs]]] = {
    "decoder": ("AutoModelForCausalLM", _ids),
    "encoder": ("AutoModel", _ids),
    "seq2seq": ("AutoModelForSeq2SeqLM", _pair),
    "image": ("AutoModel", _pixels),
    "clip": ("AutoModel", _image_and_text),
    "speech": ("AutoModelForSpeechSeq2Seq", _speech),
}


def _factory(entry: Entry, impl: str) -> Callable[[], Case]:
    def build() -> Case:
        transformers: Any = importlib.import_module("transformers")
        auto, make = AUTO[entry.kind]
        config = getattr(transformers, entry.config)(**entry.options)
        model = getattr(transformers, entry.auto or auto).from_config(config, attn_implementation=impl)
        options: Options = dict(causal=entry.kind in ("decoder", "seq2seq", "speech"))
        options |= dict(decoder=options["causal"])
        if entry.kind == "image":
            options |= dict(sizes=((3, LENGTH), (4, LENGTH)))
        return Case(model.float(), entry.make or make, **(options | entry.case))

    return build


def _decoder(name: str, config: str, options: Options, **more: Any) -> Entry:
    return Entry(name, config, "decoder", options, **more)


def _encoder(name: str, config: str, options: Options, **more: Any) -> Entry:
    return Entry(name, config, "encoder", options, **more)


def _image(name: str, config: str, options: Options, **more: Any) -> Entry:
    return Entry(name, config, "image", options, **more)


ENTRIES: list[Entry] = [
    _decoder("llama", "LlamaConfig", GROUPED),
    _decoder("llama_padded", "LlamaConfig", GROUPED, make=_left_padded, mask="varied"),
    _decoder("qwen2", "Qwen2Config", GROUPED),
    _decoder("qwen3", "Qwen3Config", GROUPED | dict(head_dim=16)),
    _decoder("mistral", "MistralConfig", GROUPED | dict(sliding_window=8), mask="sliding:8"),
    _decoder("mixtral", "MixtralConfig", GROUPED | dict(num_local_experts=4, sliding_window=None), others=2),
    _decoder(
        "gemma2", "Gemma2Config", GROUPED | dict(head_dim=16, sliding_window=8), mask="sliding:8,causal", impls=EAGER
    ),
    _decoder("gemma3_text", "Gemma3TextConfig", GROUPED | dict(head_dim=16, sliding_window=8), mask="sliding:8"),
    _decoder("phi", "PhiConfig", TEXT),
    _decoder("phi3", "Phi3Config", GROUPED),
    _decoder("gpt2", "GPT2Config", GPT),
    _decoder(
        "gpt_neo",
        "GPTNeoConfig",
        TEXT | dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8),
        mask="causal,sliding:8",
        impls=EAGER,
    ),
    _decoder("gpt_neox", "GPTNeoXConfig", TEXT),
    _decoder("gptj", "GPTJConfig", GPT | dict(rotary_dim=8), impls=EAGER),
    _decoder("gpt_bigcode", "GPTBigCodeConfig", GPT),
    _decoder("codegen", "CodeGenConfig", GPT | dict(rotary_dim=8), impls=EAGER),
    _decoder("bloom", "BloomConfig", IDS | dict(hidden_size=64, n_layer=2, n_head=4), impls=EAGER),
    _decoder("mpt", "MptConfig", IDS | dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=128), impls=EAGER),
    _decoder("falcon", "FalconConfig", IDS | LAYERS | dict(new_decoder_architecture=False)),
    _decoder("opt", "OPTConfig", TEXT | dict(ffn_dim=128, word_embed_proj_dim=64)),
    _decoder("olmo2", "Olmo2Config", GROUPED),
    _decoder("cohere", "CohereConfig", GROUPED),
    _decoder("stablelm", "StableLmConfig", GROUPED),
    _decoder("granite", "GraniteConfig", GROUPED),
    _decoder("starcoder2", "Starcoder2Config", GROUPED | dict(sliding_window=None)),
    _decoder("smollm3", "SmolLM3Config", GROUPED),
    _decoder("glm", "GlmConfig", GROUPED | dict(head_dim=16)),
    _decoder(
        "xglm",
        "XGLMConfig",
        IDS | dict(d_model=64, ffn_dim=128, num_layers=2, attention_heads=4, max_position_embeddings=128),
        impls=EAGER,
    ),
    _decoder(
        "gpt_oss",
        "GptOssConfig",
        GROUPED | dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        others=2,
        mask="sliding:8,causal",
        impls=EAGER,
    ),
    _decoder("qwen2_moe", "Qwen2MoeConfig", GROUPED | MOE | dict(shared_expert_intermediate_size=64), others=2),
    _decoder("qwen3_moe", "Qwen3MoeConfig", GROUPED | MOE | dict(head_dim=16), others=2),
    _decoder("deepseek_v3", "DeepseekV3Config", TEXT | DEEPSEEK),
    _encoder("bert", "BertConfig", TEXT),
    _encoder("bert_padded", "BertConfig", TEXT, make=_padded, mask="varied"),
    _encoder(
        "distilbert",
        "DistilBertConfig",
        IDS | dict(dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=128),
    ),
    _encoder("roberta", "RobertaConfig", TEXT),
    _encoder("electra", "ElectraConfig", TEXT | dict(embedding_size=32)),
    _encoder("albert", "AlbertConfig", TEXT | dict(embedding_size=32), notes="one layer, called twice"),
    _encoder("mpnet", "MPNetConfig", TEXT, impls=EAGER),
    _encoder(
        "deberta_v2", "DebertaV2Config", TEXT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"]), impls=EAGER
    ),
    _encoder("xlnet", "XLNetConfig", IDS | dict(d_model=64, n_layer=2, n_head=4, d_inner=128), impls=EAGER),
    _encoder(
        "modernbert",
        "ModernBertConfig",
        TEXT | dict(local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2),
        mask="bidirectional,other",
    ),
    _encoder("esm", "EsmConfig", TEXT | dict(mask_token_id=3)),
    _encoder(
        "longformer",
        "LongformerConfig",
        TEXT | dict(attention_window=8),
        mask="varied",
        impls=EAGER,
        notes="export of the whole model fails on a data-dependent branch",
    ),
    Entry("t5", "T5Config", "seq2seq", T5, cores=6),
    Entry("bart", "BartConfig", "seq2seq", BART, cores=6),
    Entry("pegasus", "PegasusConfig", "seq2seq", BART, cores=6),
    Entry("whisper", "WhisperConfig", "speech", WHISPER, cores=6),
    Entry("clip", "CLIPConfig", "clip", CLIP, cores=4, mask="bidirectional,bidirectional,causal,causal"),
    _image("vit", "ViTConfig", VISION),
    _image("deit", "DeiTConfig", VISION),
    _image("beit", "BeitConfig", VISION | dict(use_relative_position_bias=True)),
    _image("dinov2", "Dinov2Config", VISION),
    _image("siglip_vision", "SiglipVisionConfig", VISION, cores=3),
    _image("swin", "SwinConfig", SWIN, cores=4, mask="bidirectional,varied,bidirectional,bidirectional"),
    _image(
        "swinv2", "Swinv2Config", SWIN, cores=4, mask="bidirectional,varied,bidirectional,bidirectional", impls=EAGER
    ),
    _image("sam", "SamConfig", SAM, cores=9),
    _image("segformer", "SegformerConfig", SEGFORMER),
]


def specs() -> list[Spec]:
    return [spec for entry in ENTRIES for spec in entry.specs()]
