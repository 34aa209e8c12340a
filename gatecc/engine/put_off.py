"""Put off: a transform of a model on the meta device, which has shapes and no weights.

Graphs, sites, effects and reports need none. What does need them, numerical checks and new modules that are filled from
the model's own weights, is done when they come: `gatecc.materialise` does the transform again, for good.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gatecc.capture.signature import OpaqueArgumentError, map_tensors
from gatecc.errors import UnsupportedModelError
from gatecc.ir.weights import modules_of

NOTE = (
    "the model is on the meta device: no number was checked, and new modules hold nothing yet. "
    "gatecc.materialise(model, weights) loads the model's weights, fills new modules from them and does the checks"
)


def on_meta(model: nn.Module) -> bool:
    """Whether a model's weights are on the meta device. Raises UnsupportedModelError if some are and others are not, or
    if another library keeps them elsewhere."""
    kinds: dict[bool, str] = {}
    for name, p in model.named_parameters():
        kinds.setdefault(p.is_meta, name)
    if True not in kinds:
        return False
    hooked = next((n for n, m in model.named_modules() if "_hf_hook" in vars(m)), None)
    if hooked is None and False not in kinds:
        return True
    raise UnsupportedModelError(
        "some weights of the model are on the meta device",
        where=kinds[True],
        found=f"{kinds[False]} is not" if hooked is None else f"a hook of accelerate on {hooked or 'the model'}",
        expected="all of them, or none",
        do="load the others first; take hooks off: accelerate.hooks.remove_hook_from_submodules(model)",
    )


@contextmanager
def buffers_on_meta(model: nn.Module) -> Generator[None]:
    """Buffers that have values, as ``accelerate.init_empty_weights`` leaves them, on the meta device for a while."""
    put = [(m, n, b) for m in modules_of(model) for n, b in m._buffers.items() if b is not None and not b.is_meta]
    for module, name, buffer in put:
        module._buffers[name] = buffer.to("meta")
    try:
        yield
    finally:
        for module, name, buffer in put:
            if name in module._buffers:
                module._buffers[name] = buffer


def moved(call: tuple[tuple[Any, ...], dict[str, Any]], device: torch.device | str) -> Any:
    """A call with its tensors on a device; one that holds other things than tensors and constants as it is."""
    try:
        return map_tensors(lambda x: x.to(device), call)
    except OpaqueArgumentError:
        return call
