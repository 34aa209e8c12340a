"""What the example on a recipe's page needs: options without a default, and another model than the tiny transformer."""

from __future__ import annotations

import inspect
from typing import Any

import gatecc
from gatecc.recipes import ensembles, streams

# Of recipes with an option that has no default (and guess, whose default names an input that its sample has not), what
# their first case gives, unless the page shows something shorter.
OPTIONS: dict[str, dict[str, Any]] = {
    info.name: dict(info.cases[0].options)
    for info in gatecc.recipes()
    if info.name == "guess" or any(default is inspect.Parameter.empty for default in info.options.values())
} | {
    "divcontrol": {"condition": "text"},
    "rrnco": {"k": 3},
    "mhr": {"tasks": 2},
    "poly": {"tasks": 2},
    "gcab": {"tasks": 3},
    "m3vit": {"tasks": 3},
    "max-former": {"kernels": (3,)},
}
MODELS: dict[str, str] = {
    "gated-swinrmt": """import timm

shape = {"img_size": 8, "patch_size": 2, "embed_dim": 8, "depths": (1,), "num_heads": (2,), "window_size": 4}
model, example_inputs = timm.create_model("swin_tiny_patch4_window7_224", **shape), (torch.randn(2, 3, 8, 8),)
""",
    **dict.fromkeys(("lina", "vig"), "example_inputs = torch.randn(2, 9, 16), example_inputs[1]  # 3 x 3 patches\n"),
    **{
        name: f"from gatecc.recipes import samples\n\nmodel, example_inputs = samples.{sample}()\n"
        for names, sample in (
            ("dyn-perceiver jei-dnn", "classifier"),
            ("divcontrol easycontrol gcab m3vit mhr poly unicon", "conditioned"),
            ("fast-experts", "mixture"),
            ("hash-experts", "points"),
            ("armorm", "prompted"),
            ("mocoop", "described"),
            ("pill", "images"),
            ("dynamic-confidence tsm-conv", "spiking"),
            ("d2it max-former", "picture_patches"),
            ("ftwt multi-scale-gates", "pictures"),
            ("guiding-giants unlasting-mask x-lora", "language"),
            ("hrpo", "thinking"),
            ("q-zoom", "two_scales"),
            ("persistent-transient tpgn", "series"),
            ("cgib global-workspace", "sequences"),
        )
        for name in names.split()
    },
    "pgn": "model, example_inputs = nn.GRU(8, 16, batch_first=True), (torch.randn(2, 9, 8),)\n",
}
# Recipes for several models or streams: the model of their first case, which no transformer stands for.
for info in gatecc.recipes():
    for module in (ensembles, streams):
        if (sample := info.cases[0].sample).__module__ == module.__name__:
            short = module.__name__.rsplit(".", 1)[-1]
            line = f"model, example_inputs = {short}.{sample.__name__}()  # {(sample.__doc__ or '').rstrip('.')}"
            MODELS[info.name] = f"from gatecc.recipes import {short}\n\n{line}\n"
