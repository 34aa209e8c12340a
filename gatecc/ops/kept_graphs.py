"""Graphs that Inductor keeps on disk hold how results of operators lie in memory, but their keys do not.

So a graph that was compiled before an operator's results came to lie otherwise would be run on them, and fail
("expected stride ..."). The keys are told which operators these are.
"""

from __future__ import annotations

import torch

REVISION = 2  # to be counted up when the shape, the strides or the dtype of an operator's result change


def tell() -> None:
    """Make the operators' revision part of the keys of compiled graphs."""
    config = torch.compiler.config
    config.cache_key_tag = f"{config.cache_key_tag} gatecc's operators {REVISION}".strip()
