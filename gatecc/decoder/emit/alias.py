"""is_alias: captured nodes that a step need not write."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gatecc.ir.ops import opname
from gatecc.ir.sizes import same


def is_alias(node: fx.Node) -> bool:
    """Whether a captured node hands on its first argument: casts to the same type, detach, dropout in eval mode."""
    source = node.args[0] if node.args else None
    held, given = node.meta.get("val"), source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(held, torch.Tensor) or not isinstance(given, torch.Tensor):
        return False
    name, args = opname(node), list[Any](node.args)
    if name in ("detach", "alias", "lift_fresh"):
        return True
    if name == "dropout":
        return not (len(args) > 2 and args[2])
    if name == "to":
        return held.dtype == given.dtype and held.device == given.device and True not in args[1:]
    return name == "slice" and all(map(same, held.shape, given.shape))
