"""Sliding windows of an attention, as configurations of transformers say them: a comparison of a few tokens would not
see them."""

from __future__ import annotations

from typing import Any


def windows(config: Any) -> tuple[int | None, ...]:
    """How many tokens each layer of a decoder sees, first to last; None for all of them."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return (window if getattr(config, "use_sliding_window", True) else None,) * config.num_hidden_layers
