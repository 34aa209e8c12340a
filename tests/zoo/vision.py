"""timm and torchvision architectures, tiny, with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.zoo.spec import LENGTH, Case, Inputs, Spec, noise

Options = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One row of the table. `maker` is a timm model name, or module.Class below timm.models or torchvision.models."""

    name: str
    maker: str
    options: Options
    cores: int
    others: int = 0
    mask: str | None = "bidirectional"
    fused: bool = False
    """timm can run it fused ("sdpa") and spelled out ("eager")."""
    image: int = 32
    notes: str = ""


def _case(model: Any, image: int) -> Case:
    def make(batch: int, _: int) -> Inputs:
        return Inputs((noise(batch, 3, image, image),), {})

    return Case(model, make, sizes=((3, LENGTH), (4, LENGTH)))


def _timm(entry: Entry, impl: str) -> Callable[[], Case]:
    def build() -> Case:
        layers: Any = importlib.import_module("timm.layers")
        config: Any = importlib.import_module("timm.layers.config")
        level = config._USE_FUSED_ATTN
        layers.set_fused_attn(impl == "sdpa", experimental=True)  # modules read it while they are built
        try:
            return _case(_make("timm.models.", entry), entry.image)
        finally:
            config._USE_FUSED_ATTN = level

    return build


def _torchvision(entry: Entry) -> Callable[[], Case]:
    return lambda: _case(_make("torchvision.models.", entry), entry.image)


def _make(package: str, entry: Entry) -> Any:
    options = dict(num_classes=10) | entry.options
    module, _, name = entry.maker.rpartition(".")
    if not module:
        timm: Any = importlib.import_module("timm")
        return timm.create_model(name, **options)
    return getattr(importlib.import_module(package + module), name)(**options)


VIT: Options = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)
FOUR: Options = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64), num_heads=(1, 2, 2, 4))
SWIN: Options = dict(img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4)
TWINS: Options = FOUR | dict(img_size=32, patch_size=2, depths=(2, 2, 1, 1), wss=(4, 4, 4, 2))
NEST: Options = dict(img_size=32, patch_size=2, embed_dims=(16, 32, 64), num_heads=(1, 2, 4), depths=(1, 1, 1))
LEVIT: Options = dict(img_size=64, embed_dim=(32, 64), key_dim=8, depth=(1, 1), num_heads=(2, 4))
COATNET: Options = dict(img_size=64, depths=(1, 1, 1, 1), embed_dim=(16, 32, 32, 64), stem_width=16)
MAXVIT: Options = dict(img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=16)
DAVIT: Options = dict(depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4), window_size=4)
HIERA: Options = dict(img_size=(64, 64), embed_dim=32, num_heads=1, stages=(1, 1, 1, 1))
VISFORMER: Options = dict(img_size=64, embed_dim=64, depth=(1, 1, 1), num_heads=4)
CROSSVIT: Options = dict(img_size=48, img_scale=(1.0, 1.0), patch_size=(12, 16), embed_dim=(32, 64)) | dict(
    depth=((1, 1, 1),), num_heads=(2, 4), mlp_ratio=(2, 2, 1)
)
TNT: Options = dict(img_size=32, patch_size=16, embed_dim=64, depth=2)
TNT_HEADS: Options = dict(inner_dim=16, num_heads_inner=2, num_heads_outer=4)
VOLO_STAGES: Options = dict(layers=(1, 1), downsamples=(True, False), outlook_attention=(True, False))
VOLO_SIZES: Options = dict(img_size=32, patch_size=4, stem_hidden_dim=16, num_heads=(2, 4), embed_dims=(32, 64))
VOLO: Options = VOLO_STAGES | VOLO_SIZES | dict(use_aux_head=False)
COAT: Options = dict(
    img_size=64,
    patch_size=4,
    embed_dims=(32, 32, 32, 64),
    serial_depths=(1, 1, 1, 1),
    num_heads=4,
    crpe_window={3: 2, 5: 2},
)
EDGENEXT: Options = dict(depths=(1, 1, 1, 1), dims=(16, 32, 32, 64), heads=(4, 4, 4, 4))
MIXER: Options = dict(img_size=32, patch_size=8, embed_dim=64, num_blocks=2)

WINDOWS = "bidirectional,varied,bidirectional,varied"  # every other block shifts its windows
CHANNELS = "attention over channels, not over tokens"

TIMM = [
    Entry("vit", "vit_tiny_patch16_224", VIT, 2, fused=True),
    Entry(
        "vit_map", "vit_base_patch16_siglip_224", VIT, 3, fused=True, notes="pools by attention with a learned query"
    ),
    Entry("vit_relpos", "vit_relpos_small_patch16_224", VIT, 2, fused=True),
    Entry("deit3", "deit3_small_patch16_224", VIT, 2, fused=True),
    Entry("eva", "eva02_tiny_patch14_224", VIT, 2, fused=True),
    Entry("beit", "beit_base_patch16_224", VIT, 2, fused=True),
    Entry("cait", "cait_xxs24_224", VIT | dict(depth_token_only=2), 2, 2, fused=True, notes="talking heads twice"),
    Entry("xcit", "xcit_nano_12_p8_224", VIT, 4, fused=True, notes=f"the first two cores: {CHANNELS}"),
    Entry("swin", "swin_tiny_patch4_window7_224", SWIN, 4, mask=WINDOWS, fused=True),
    Entry("swinv2", "swinv2_tiny_window8_256", SWIN, 4, mask=WINDOWS),
    Entry("pvt_v2", "pvt_v2_b0", FOUR, 4, fused=True),
    Entry("twins", "twins_svt_small", TWINS, 6, fused=True),
    Entry("nest", "nest.Nest", NEST, 3, fused=True),
    Entry("levit", "levit_128s", LEVIT, 3, image=64),
    Entry("coatnet", "coatnet_0_rw_224", COATNET, 2, fused=True, image=64),
    Entry("maxvit", "maxvit_rmlp_pico_rw_256", MAXVIT, 4, fused=True, image=64),
    Entry("davit", "davit_tiny", DAVIT, 4, fused=True, notes=f"every other core: {CHANNELS}"),
    Entry("hiera", "hiera_tiny_224", HIERA, 4, fused=True, image=64),
    Entry("visformer", "visformer_tiny", VISFORMER, 2, fused=True, image=64),
    Entry("convit", "convit_tiny", VIT | dict(local_up_to_layer=1), 1, 2, notes="two softmaxes mixed by a gate"),
    Entry("crossvit", "crossvit_9_240", CROSSVIT, 4, image=48),
    Entry("tnt", "tnt_s_patch16_224", TNT | TNT_HEADS, 4),
    Entry("volo", "volo.VOLO", VOLO, 3, 1, fused=True, notes="outlook attention has no keys"),
    Entry("coat", "coat_lite_tiny", COAT, 0, 4, image=64, notes="linear attention: a softmax of k"),
    Entry("edgenext", "edgenext_xx_small", EDGENEXT, 3, image=64, notes=CHANNELS),
    Entry("mobilevit", "mobilevit_xxs", dict(img_size=64), 9, fused=True, image=64),
    Entry("convnext", "convnext_atto", dict(depths=(1, 1, 1, 1), dims=(16, 32, 32, 64)), 0),
    Entry("mixer", "mlp_mixer.MlpMixer", MIXER, 0),
    Entry("resnetv2", "resnetv2_50", dict(layers=(1, 1, 1, 1), channels=(16, 32, 32, 64), stem_chs=16), 0, image=64),
]

TV_VIT: Options = dict(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128)
TV_SWIN: Options = dict(patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4])
TV_MAXVIT: Options = dict(input_size=(32, 32), stem_channels=16, partition_size=2, block_channels=[16, 32]) | dict(
    block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.1
)

TORCHVISION = [
    Entry("vit", "vision_transformer.VisionTransformer", TV_VIT, 2),
    Entry("swin_t", "swin_transformer.SwinTransformer", TV_SWIN, 4, mask=WINDOWS),
    Entry("maxvit", "maxvit.MaxVit", TV_MAXVIT, 4),
    Entry("resnet18", "resnet.resnet18", {}, 0, image=64),
    Entry("densenet", "densenet.DenseNet", dict(growth_rate=8, block_config=(2, 2), num_init_features=16), 0),
]


def specs() -> list[Spec]:
    timm = [
        Spec(e.name, "timm", impl, _timm(e, impl), e.cores, e.others, e.mask, e.notes)
        for e in TIMM
        for impl in (("sdpa", "eager") if e.fused else ("",))
    ]
    torchvision = [
        Spec(e.name, "torchvision", "", _torchvision(e), e.cores, e.others, e.mask, e.notes) for e in TORCHVISION
    ]
    return timm + torchvision
