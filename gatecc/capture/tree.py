"""Tree: the arguments of a call as plain JSON data, with the tensors apart under numbered names."""

from __future__ import annotations

from typing import Any, cast

import torch

from gatecc.errors import ArgumentError

_TORCH = {torch.dtype: "dtype", torch.memory_format: "memory_format", torch.layout: "layout"}


def encode(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """``value`` as JSON data; each tensor in it is added to ``tensors`` (one that occurs twice, once).

    Tuples, lists, dicts, None, Python constants, dtypes and devices are taken. Raises ArgumentError for anything else.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float | complex | bytes):
        return {type(value).__name__: value.hex() if isinstance(value, float | bytes) else repr(value)}
    if isinstance(value, torch.Tensor):
        return {"tensor": _name(value, tensors)}
    if type(value) is tuple or type(value) is list:
        items = cast("list[Any]", value)
        return {type(value).__name__: [encode(v, tensors, f"{path}[{i}]") for i, v in enumerate(items)]}
    if type(value) is dict:
        pairs = cast("dict[Any, Any]", value).items()
        return {"dict": [[encode(k, tensors, path), encode(v, tensors, f"{path}[{k!r}]")] for k, v in pairs]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    for kind, name in _TORCH.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise ArgumentError(
        "an example input cannot be written to a file",
        where=path,
        found=f"{type(value).__module__}.{type(value).__qualname__}",
        expected="tensors, constants and None in tuples, lists and dicts",
        do="transform the model with example inputs that hold no such object",
    )


def decode(data: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of encode. Raises KeyError, ValueError or TypeError if the data is not what encode makes."""
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise TypeError("a bare list")
        return data
    ((kind, value),) = cast("dict[str, Any]", data).items()
    match kind:
        case "tensor":
            return tensors[value]
        case "tuple":
            return tuple(decode(v, tensors) for v in value)
        case "list":
            return [decode(v, tensors) for v in value]
        case "dict":
            return {decode(k, tensors): decode(v, tensors) for k, v in value}
        case "float":
            return float.fromhex(value)
        case "complex":
            return complex(value)
        case "bytes":
            return bytes.fromhex(value)
        case "device":
            return torch.device(value)
        case "dtype" | "memory_format" | "layout":
            return getattr(torch, value)
        case _:
            raise ValueError(f"unknown kind of value {kind!r}")


def _name(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> str:
    for name, known in tensors.items():
        if known is tensor:
            return name
    name = str(len(tensors))
    tensors[name] = tensor
    return name
