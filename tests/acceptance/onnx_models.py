"""Models that are exported as ONNX, by kind: those of the zoo, and more of transformers and timm, tiny."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.zoo.huggingface import BART, GROUPED, IDS, LAYERS, MOE, T5, TEXT, VISION, Options
from tests.zoo.models import find
from tests.zoo.spec import VOCAB, Inputs, noise, padding, tokens

ZOO: dict[str, tuple[str, ...]] = {
    "decoder": (
        *("hf/llama_padded-sdpa", "hf/mistral-sdpa", "hf/qwen2-sdpa", "hf/qwen3-eager", "hf/gemma2-eager"),
        *("hf/gemma3_text-sdpa", "hf/phi-sdpa", "hf/phi3-sdpa", "hf/gpt2-sdpa", "hf/gpt_neox-sdpa", "hf/bloom-eager"),
        *("hf/mpt-eager", "hf/falcon-sdpa", "hf/opt-sdpa", "hf/olmo2-sdpa", "hf/granite-sdpa", "hf/starcoder2-sdpa"),
    ),
    "encoder": (
        *("hf/bert_padded-sdpa", "hf/roberta-sdpa", "hf/distilbert-sdpa", "hf/albert-sdpa", "hf/deberta_v2-eager"),
        *("hf/modernbert-sdpa", "hf/xlnet-eager", "hf/esm-sdpa"),
    ),
    "experts": ("hf/mixtral-sdpa", "hf/gpt_oss-eager", "hf/qwen2_moe-sdpa", "hf/qwen3_moe-sdpa", "hf/deepseek_v3-sdpa"),
    "seq2seq": ("hf/t5-eager", "hf/bart-sdpa", "hf/pegasus-sdpa"),
    "audio": ("hf/whisper-sdpa",),
    "vision": (
        *("hf/clip-sdpa", "hf/vit-sdpa", "hf/swin-sdpa", "hf/segformer-sdpa", "hf/dinov2-sdpa"),
        *("timm/vit-sdpa", "timm/swin-eager", "timm/cait-eager", "timm/coatnet-sdpa", "timm/mobilevit-sdpa"),
        *("timm/convnext", "torchvision/resnet18", "torchvision/swin_t", "torchvision/maxvit"),
    ),
    "part": ("torch/encoder", "torch/mha_cross", "hand/sdpa_gqa", "hand/alibi"),
}


class Other(NamedTuple):
    """A model that the zoo does not hold: an Auto class of transformers with a config, or a model of timm (``auto`` is
    empty, ``config`` its name)."""

    kind: str
    auto: str
    config: str
    options: Options
    make: Callable[[], Mapping[str, Any]]


def _ids() -> Options:
    return {"input_ids": tokens(2, 16)}


def _padded() -> Options:
    return {"input_ids": tokens(2, 16), "attention_mask": padding(2, 16).long()}


def _pair() -> Options:
    return {"input_ids": tokens(2, 16), "decoder_input_ids": tokens(2, 12, seed=1)}


def _padded_pair() -> Options:
    return {**_pair(), "attention_mask": padding(2, 16).long(), "decoder_attention_mask": torch.ones(2, 12).long()}


def _image() -> Options:
    return {"pixel_values": noise(2, 3, 32, 32)}


def _timm_image() -> Options:
    return {"x": noise(2, 3, 64, 64)}


def _wave() -> Options:
    return {"input_values": noise(2, 800)}


def _waves() -> Options:
    return {"input_values": noise(2, 1, 800)}


def _spectrum() -> Options:
    return {"input_values": noise(2, 32, 16)}


def _heard() -> Options:
    return {"input_values": noise(2, 4000), "decoder_input_ids": tokens(2, 6)}


def _features() -> Options:
    return {"input_features": noise(2, 32, 16), "decoder_input_ids": tokens(2, 6)}


def _series() -> Options:
    return {"past_values": noise(2, 32, 3)}


WAVE: Options = LAYERS | dict(
    vocab_size=VOCAB, intermediate_size=128, conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3),
    num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
)  # fmt: skip
SEEN: Options = dict(hidden_sizes=[16, 32], depths=[1, 1])
SCANNED: Options = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=8)
OTHERS: dict[str, Other] = {
    "mamba": Other("decoder", "AutoModelForCausalLM", "MambaConfig", SCANNED, _ids),
    "mamba2": Other(
        "decoder", "AutoModelForCausalLM", "Mamba2Config", SCANNED | dict(num_heads=8, head_dim=16, n_groups=2), _ids
    ),
    "qwen3_next": Other(
        "decoder", "AutoModelForCausalLM", "Qwen3NextConfig",
        GROUPED | MOE | dict(
            head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
            linear_value_head_dim=16, shared_expert_intermediate_size=32,
            layer_types=["linear_attention", "full_attention"],
        ), _ids,
    ),
    "cohere": Other("decoder", "AutoModelForCausalLM", "CohereConfig", GROUPED, _padded),
    "lfm2": Other(
        "decoder", "AutoModelForCausalLM", "Lfm2Config", GROUPED | dict(layer_types=["conv", "full_attention"]), _ids
    ),
    "gpt_neo": Other(
        "decoder", "AutoModelForCausalLM", "GPTNeoConfig",
        TEXT | dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8), _ids,
    ),
    "olmoe": Other(
        "experts", "AutoModelForCausalLM", "OlmoeConfig", GROUPED | dict(num_experts=4, num_experts_per_tok=2), _ids
    ),
    "granite_moe": Other(
        "experts", "AutoModelForCausalLM", "GraniteMoeConfig",
        GROUPED | dict(num_local_experts=4, num_experts_per_tok=2), _ids,
    ),
    "switch": Other(
        "experts", "AutoModelForSeq2SeqLM", "SwitchTransformersConfig",
        T5 | dict(num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1), _padded_pair,
    ),
    "marian": Other("seq2seq", "AutoModelForSeq2SeqLM", "MarianConfig", BART, _pair),
    "mbart": Other("seq2seq", "AutoModelForSeq2SeqLM", "MBartConfig", BART, _pair),
    "m2m_100": Other("seq2seq", "AutoModelForSeq2SeqLM", "M2M100Config", BART, _pair),
    "electra": Other("encoder", "AutoModelForMaskedLM", "ElectraConfig", TEXT | dict(embedding_size=32), _padded),
    "fnet": Other("encoder", "AutoModel", "FNetConfig", TEXT, _ids),
    "funnel": Other(
        "encoder", "AutoModelForMaskedLM", "FunnelConfig",
        dict(vocab_size=VOCAB, block_sizes=[1, 1], block_repeats=[1, 1], d_model=64, n_head=4, d_head=16,
             d_inner=128), _ids,
    ),
    "roformer": Other("encoder", "AutoModel", "RoFormerConfig", TEXT, _padded),
    "wav2vec2": Other("audio", "AutoModelForCTC", "Wav2Vec2Config", WAVE, _wave),
    "hubert": Other("audio", "AutoModel", "HubertConfig", WAVE, _wave),
    "wavlm": Other("audio", "AutoModel", "WavLMConfig", WAVE, _wave),
    "ast": Other(
        "audio", "AutoModelForAudioClassification", "ASTConfig",
        LAYERS | dict(intermediate_size=128, patch_size=4, frequency_stride=4, time_stride=4, max_length=32,
                      num_mel_bins=16), _spectrum,
    ),
    "speech_to_text": Other(
        "audio", "AutoModelForSpeechSeq2Seq", "Speech2TextConfig",
        BART | dict(input_feat_per_channel=16, input_channels=1, conv_channels=32, max_source_positions=64,
                    max_target_positions=64), _features,
    ),
    "moonshine": Other(
        "audio", "AutoModelForSpeechSeq2Seq", "MoonshineConfig",
        IDS | dict(hidden_size=64, intermediate_size=128, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
                   encoder_num_attention_heads=4, decoder_num_attention_heads=4, decoder_start_token_id=1), _heard,
    ),
    "encodec": Other(
        "audio", "AutoModel", "EncodecConfig",
        dict(num_filters=4, hidden_size=16, codebook_dim=16, codebook_size=32, upsampling_ratios=[4, 2],
             num_lstm_layers=1, target_bandwidths=[30.0]), _waves,
    ),
    "patchtst": Other(
        "audio", "AutoModel", "PatchTSTConfig",
        dict(num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, num_hidden_layers=1, d_model=32,
             num_attention_heads=4, ffn_dim=64), _series,
    ),
    "yolos": Other(
        "vision", "AutoModelForObjectDetection", "YolosConfig",
        VISION | dict(image_size=[32, 32], num_detection_tokens=5), _image,
    ),
    "dpt": Other(
        "vision", "AutoModelForDepthEstimation", "DPTConfig",
        VISION | dict(num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
                      fusion_hidden_size=8, is_hybrid=False), _image,
    ),
    "resnet": Other("vision", "AutoModel", "ResNetConfig", SEEN | dict(embedding_size=16), _image),
    "regnet": Other("vision", "AutoModel", "RegNetConfig", SEEN | dict(embedding_size=16, groups_width=8), _image),
    "convnextv2": Other("vision", "AutoModel", "ConvNextV2Config", SEEN | dict(num_stages=2), _image),
    "poolformer": Other(
        "vision", "AutoModel", "PoolFormerConfig",
        SEEN | dict(num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]), _image,
    ),
    "pvt": Other(
        "vision", "AutoModel", "PvtConfig",
        SEEN | dict(image_size=32, num_encoder_blocks=2, num_attention_heads=[1, 2], sequence_reduction_ratios=[2, 1],
                    patch_sizes=[4, 2], strides=[4, 2], mlp_ratios=[2, 2]), _image,
    ),
    "efficientnet_b0": Other("vision", "", "efficientnet_b0", {}, _timm_image),
    "mobilenetv3_small": Other("vision", "", "mobilenetv3_small_050", {}, _timm_image),
    "repvgg": Other("vision", "", "repvgg_a0", {}, _timm_image),
    "efficientvit": Other("vision", "", "efficientvit_b0", {}, _timm_image),
}  # fmt: skip
KINDS: dict[str, str] = {name: kind for kind, names in ZOO.items() for name in names} | {
    name: other.kind for name, other in OTHERS.items()
}


def built(name: str) -> tuple[nn.Module, Any]:
    """A model in eval mode and example inputs."""
    if name not in OTHERS:
        case = find(name).build()
        return case.model, case.inputs
    _, auto, config, options, make = OTHERS[name]
    if not auto:
        timm: Any = importlib.import_module("timm")
        return timm.create_model(config, num_classes=10, **options).eval(), Inputs((), dict(make()))
    transformers: Any = importlib.import_module("transformers")
    model = getattr(transformers, auto).from_config(getattr(transformers, config)(**options))
    return model.float().eval(), Inputs((), dict(make()))
