"""A launcher: a module of kernels that is imported when a tensor on a GPU first needs it, and why there is none."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from gatecc.codegen.notice import say_once

TYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # compute capability: before it there is no TF32


class Launcher:
    """The module ``name``, whose functions serve ``what`` ("experts run") on GPUs. Triton takes a second to import."""

    def __init__(self, name: str, what: str) -> None:
        self.name, self.what = name, what
        self._found: ModuleType | str | None = None
        self._lacks: dict[torch.device, str | None] = {}

    def module(self) -> ModuleType | str:
        """The kernels, or why there are none."""
        if self._found is None:
            try:
                self._found = import_module(self.name)
            except ImportError as error:
                self._found = f"Triton cannot be imported ({error})"
        return self._found

    def missing(self, device: torch.device) -> str | None:
        """What the machine lacks; None if it has all."""
        if device not in self._lacks:
            self._lacks[device] = self._missing(device)
        return self._lacks[device]

    def _missing(self, device: torch.device) -> str | None:
        found = self.module()
        if isinstance(found, str):
            return found
        if device.type != "cuda" or torch.version.hip:
            return None
        if torch.cuda.get_device_capability(device) >= OLDEST:
            return None
        return f"{torch.cuda.get_device_name(device)} is older than the kernels ask for"

    def run(self, function: str, reason: str | None, *given: Any, quiet: bool = False, **options: Any) -> Any:
        """Call a function of the launcher; None, and the reason in the log, once, if there is one against it."""
        module = self.module()
        if reason is None and not isinstance(module, str):
            return getattr(module, function)(*given, **options)
        if not quiet:
            say_once(f"{self.what} in ATen and not by a GPU kernel: {reason}")
        return None
