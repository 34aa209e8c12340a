"""Samples: small models that recipes are checked on, each with its example inputs. Plain torch, random weights.

``sequences`` takes and returns features (B, N, C), ``language`` token ids (B, N) to logits, ``patches`` the patches of
an image in raster order, ``pictures`` images (B, 3, H, W), ``series`` is a GRU.
Weights are the same each time, and none is at a start that hides a fault
(no norm with a weight of 1, no bias of 0).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import MissingPackageError
from gatecc.passes.loop.think import Thinking
from gatecc.passes.zoom import TwoScales

Sample = tuple[nn.Module, tuple[Any, ...]]
_WIDTH, _HEADS, _GROUPS = 16, 4, 2


class SelfAttention(nn.Module):
    """Grouped-query attention. x: (B, N, C)"""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        head = _WIDTH // _HEADS
        self.q_proj, self.o_proj = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.k_proj, self.v_proj = nn.Linear(_WIDTH, _GROUPS * head), nn.Linear(_WIDTH, _GROUPS * head)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, _WIDTH // _HEADS)).transpose(1, 2) for p in projections)
        k, v = (t.repeat_interleave(_HEADS // _GROUPS, 1) for t in (k, v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o_proj(heads.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """x: (B, N, C)"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU(), nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """One layer, norms first. x: (B, N, C)"""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.attn, self.mlp = SelfAttention(causal), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Transformer(nn.Module):
    """``vocabulary``: token ids (B, N) -> logits; 0: features (B, N, C) -> (B, N, C).

    A timestep (B,), a mark (B, N) of the tokens that belong to an image and a ``text`` (B, C) may be added. The other
    inputs change nothing: they are what gates read.
    """

    def __init__(self, causal: bool, vocabulary: int, text: int = 0) -> None:
        super().__init__()
        self.text = nn.Linear(text, _WIDTH) if text else None
        self.embed = nn.Embedding(vocabulary, _WIDTH) if vocabulary else None
        self.blocks = nn.ModuleList(Block(causal) for _ in range(2))
        self.head = nn.Linear(_WIDTH, vocabulary) if vocabulary else None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        image: Tensor | None = None,
        task: Tensor | None = None,
        stream: Tensor | None = None,
        partner: Tensor | None = None,
        segment: Tensor | None = None,
        prompt: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        if image is not None:
            x = x + image.to(x.dtype).unsqueeze(-1)
        if timestep is not None:
            x = x + torch.sin(timestep)[:, None, None]
        if self.text is not None and text is not None:
            x = x + self.text(text).unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        return x if self.head is None else self.head(x)


class _Series(nn.Module):
    """x: (B, N, 8) -> (B, N, 16)"""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, _WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class _Pictures(nn.Module):
    """A residual network. x: (B, 3, H, W) -> (B, 5)"""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, _WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(_WIDTH)
        self.depth, self.norm2 = nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1, groups=_WIDTH), nn.BatchNorm2d(_WIDTH)
        self.conv2, self.norm3 = nn.Conv2d(_WIDTH, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        h = torch.relu(self.norm1(self.conv1(x)))
        h = torch.relu(self.norm2(self.depth(h)))
        x = torch.relu(x + self.norm3(self.conv2(h)))
        return self.head(x.mean((2, 3)))


def pictures() -> Sample:
    """A small residual network of convolutions, one of them depthwise, with batch norms."""
    return weighted(_Pictures()), (_noise(2, 3, 8, 8),)


def sequences() -> Sample:
    """An encoder of features, in both directions."""
    return weighted(_Transformer(causal=False, vocabulary=0)), (_noise(2, 6, _WIDTH),)


class _Classifier(nn.Module):
    """x: (B, N, C) -> (B, 5)"""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def classifier() -> Sample:
    """An encoder of three blocks with a head on the mean of its tokens."""
    return weighted(_Classifier()), (_noise(4, 6, _WIDTH),)


def diffusion() -> Sample:
    """The same with a timestep."""
    return weighted(_Transformer(causal=False, vocabulary=0)), (_noise(2, 6, _WIDTH), torch.tensor([10, 500]))


def sequences_in_training() -> Sample:
    """The encoder in training mode, for gates that learn there alone."""
    model, inputs = sequences()
    return model.train(), inputs


def language_in_training() -> Sample:
    """The language model in training mode."""
    model, inputs = language()
    return model.train(), inputs


def language() -> Sample:
    """A causal language model of 32 tokens."""
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(3))
    return weighted(_Transformer(causal=True, vocabulary=32)), (ids,)


def images() -> Sample:
    """The same with a mark on the tokens of an image."""
    marked = torch.tensor([[True, True, False, False, True, False], [False, True, True, False, False, False]])
    return weighted(_Transformer(causal=False, vocabulary=0)), (_noise(2, 6, _WIDTH), None, marked)


def conditioned() -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Tensor]]]:
    """The encoder with what gates may read: a task (B,) of 3, the stream (B,) of a sample and the row (B,) of its
    partner in the other, the segment (B, N) of a token, the embedding (B, 8) of a text."""
    others = {
        "task": torch.tensor([1, 2]),
        "stream": torch.tensor([0, 1]),
        "partner": torch.tensor([0, 0]),
        "segment": torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]]),
        "text": _noise(2, 8),
    }
    return weighted(_Transformer(causal=False, vocabulary=0, text=8)), ((_noise(2, 6, _WIDTH),), others)


def described() -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Tensor]]]:
    """The language model, and with each text the features (B, 8) of an image."""
    return weighted(_Transformer(causal=True, vocabulary=32, text=8)), (language()[1], {"text": _noise(2, 8)})


def prompted() -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Tensor]]]:
    """The language model, with the number (B,) of the last token of each prompt."""
    model, inputs = language()
    return model, (inputs, {"prompt": torch.tensor([3, 5])})


def thinking() -> Sample:
    """The language model with an input for soft embeddings (B, N, C), of which the first rows are zero."""
    model, inputs = language()
    soft = _noise(2, 8, _WIDTH)
    soft[:, :3] = 0
    return Thinking(model).eval(), (*inputs, soft)


class _Patches(nn.Module):
    """x: (B, 3, 8, 8) -> (B, 5), by patches of 2 x 2"""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Conv2d(3, _WIDTH, 2, 2), _Classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embed(x).flatten(2).mT)


def picture_patches() -> Sample:
    """A classifier of images by 4 x 4 patches."""
    return weighted(_Patches()), (_noise(2, 3, 8, 8),)


def two_scales() -> Sample:
    """A classifier of images by patches, with the same images at twice the resolution."""
    fine = _noise(4, 3, 16, 16)
    return weighted(TwoScales(_Patches())), (F.avg_pool2d(fine, 2), fine)


def windows() -> Sample:
    """A Swin of timm: attention inside windows of 4 x 4 patches, with learned biases. Raises MissingPackageError."""
    try:
        timm: Any = import_module("timm")
    except ImportError as e:
        raise MissingPackageError("this sample is a model of timm", found=str(e), do="pip install timm") from e
    shape = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depths": (1,), "num_heads": (2,), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **shape)
    return weighted(model), (_noise(2, 3, 8, 8),)


def mixture() -> Sample:
    """A Mixtral of transformers: 2 of 4 experts in each layer. Raises MissingPackageError."""
    try:
        transformers: Any = import_module("transformers")
    except ImportError as e:
        raise MissingPackageError(
            "this sample is a model of transformers", found=str(e), do="pip install 'gatecc[hf]'"
        ) from e
    shape = {"hidden_size": _WIDTH, "intermediate_size": _WIDTH, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": _HEADS, "num_key_value_heads": _GROUPS}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape, **heads, num_local_experts=4))
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(3))
    return weighted(model), (ids,)


def patches() -> Sample:
    """An encoder of 3 x 3 patches."""
    return weighted(_Transformer(causal=False, vocabulary=0)), (_noise(2, 9, _WIDTH),)


class _Points(nn.Module):
    """A field over space. x: (B, N, 3) -> (B, N, 4)"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(3, 16), nn.Linear(16, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(x + self.down(torch.relu(self.up(x)))))


def spiking() -> Sample:
    """A convolutional classifier with ReLUs, and a batch of images."""
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
    return weighted(nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 5))), (_noise(4, 1, 8, 8),)


def points() -> Sample:
    """An MLP of points in space, with a head."""
    return weighted(_Points()), (_noise(2, 12, 3),)


def series() -> Sample:
    """A GRU over 9 steps."""
    return weighted(_Series()), (_noise(2, 9, 8),)


def _noise(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(2))


def weighted(model: nn.Module) -> nn.Module:
    """A model in eval mode with random weights that hide no fault, the same each time."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            vector = p.dim() < 2
            scale = 0.3 if vector else p[0].numel() ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (0.5 if vector else 0.0))
    return model.eval()
