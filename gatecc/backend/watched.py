"""Watched: a compiled graph whose lowerings rest on what buffers hold, and which runs while they hold it.

A causal mask may be a buffer (nanoGPT, GPT-J). Dynamo sees it as an input like any other, so that nothing but a check
on every call keeps ``is_causal`` right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gatecc.backend.stamps import Stamp

log = logging.getLogger(__name__)


class Watched:
    """Calls ``compiled`` while the inputs at some places hold what they held, else ``plain``, which is right for all.

    A tensor that was found equal is known by its stamp, so that a call does not read all of it. One without a version
    (of inference mode) is compared on every call.
    """

    def __init__(
        self, compiled: Callable[..., Any], plain: Callable[..., Any], held: Mapping[int, torch.Tensor]
    ) -> None:
        self._compiled, self._plain = compiled, plain
        self._held = {place: tensor.detach().clone() for place, tensor in held.items()}
        self._known: dict[int, Stamp] = {}
        self._warned = False

    def __call__(self, *inputs: Any) -> Any:
        if all(self._holds(inputs[place], expected) for place, expected in self._held.items()):
            return self._compiled(*inputs)
        if not self._warned:
            self._warned = True
            log.warning(
                "gatecc: a buffer that a mask was proved from has changed; its graph runs as the model was written, "
                "uncompiled. torch._dynamo.reset() compiles it anew"
            )
        return self._plain(*inputs)

    def _holds(self, tensor: torch.Tensor, expected: torch.Tensor) -> bool:
        versioned = not tensor.is_inference()
        known = self._known.get(id(tensor)) if versioned else None
        if known is not None and known.holds(tensor):
            return True
        same = tensor.shape == expected.shape and bool(torch.equal(tensor, expected))
        if same and versioned:
            self._known[id(tensor)] = Stamp.of(tensor)
        return same
