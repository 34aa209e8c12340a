"""Stream: ONNX files written tensor by tensor, so that an export needs no second copy of the model's weights.

A protobuf message is serialised as a whole, which takes two copies of every weight. Here the message is serialised
without its large tensors, and these are appended piece by piece: inside the file as further entries of the graph, whose
length is known beforehand, or in a data file beside it, which several models may share.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGE = 1024  # bytes of a tensor from which on it is streamed
_PIECE = 2**24  # bytes of what is copied at once
_PAGE, _WORD, _MANY = 4096, 64, 2**16  # where tensors, of more than so many bytes, begin: runtimes map the file
_GRAPH, _INITIALIZER, _RAW_DATA = (number << 3 | 2 for number in (7, 5, 9))  # of ModelProto, GraphProto, TensorProto


def save(models: Mapping[str, ir.Model], folder: Path, data: str | None = None) -> None:
    """Write each model to the file of its name; weights go to the file ``data``, if it is given, once if they are
    equal."""
    if data is None:
        for name, model in models.items():
            _save_inside(model, folder / name)
        return
    with (folder / data).open("wb") as file:
        known: dict[bytes, tuple[int, int]] = {}
        for name, model in models.items():
            _save_beside(model, folder / name, file, known)


def _save_inside(model: ir.Model, path: Path) -> None:
    from onnx_ir import serde

    values = [v for v in model.graph.initializers.values() if _is_large(v.const_value)]
    large: dict[str, Any] = {str(v.name): v.const_value for v in values}
    with _Swapped(values, [_placeholder(tensor, name) for name, tensor in large.items()]):
        proto = serde.serialize_model(model)
    heads: dict[str, Any] = {t.name: t for t in proto.graph.initializer if t.name in large}
    small = [t for t in proto.graph.initializer if t.name not in large]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(small)
    inside = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    entries = {name: _entry(head, large[name].nbytes) for name, head in heads.items()}
    length = len(inside) + sum(len(entry) + large[name].nbytes for name, entry in entries.items())
    with path.open("wb") as file:
        file.write(proto.SerializeToString(deterministic=True) + bytes([_GRAPH]) + _varint(length) + inside)
        for name, entry in entries.items():
            file.write(entry)
            _append(file, large[name])


def _entry(head: Any, nbytes: int) -> bytes:
    """What stands before the bytes of an initializer inside a GraphProto."""
    head.ClearField("external_data")
    head.ClearField("data_location")
    start = head.SerializeToString(deterministic=True) + bytes([_RAW_DATA]) + _varint(nbytes)
    return bytes([_INITIALIZER]) + _varint(len(start) + nbytes) + start


def _save_beside(model: ir.Model, path: Path, file: BinaryIO, known: dict[bytes, tuple[int, int]]) -> None:
    import onnx
    import onnx_ir as ir
    from onnx_ir import serde

    values = [v for g in model.graphs() for v in g.initializers.values() if _is_large(v.const_value)]
    held: list[Any] = []
    for value in values:
        tensor: Any = value.const_value
        offset, length = _place(file, tensor, known)
        location = Path(file.name).name
        held.append(ir.ExternalTensor(location, offset, length, tensor.dtype, name=str(value.name), shape=tensor.shape))
    with _Swapped(values, held):
        onnx.save(serde.serialize_model(model), path)


def _place(file: BinaryIO, tensor: Any, known: dict[bytes, tuple[int, int]]) -> tuple[int, int]:
    """Where a tensor lies in the data file: where one of the same bytes does, else at its end."""
    import hashlib

    digest = hashlib.sha256()
    for piece in _pieces(tensor):
        digest.update(piece)
    key = digest.digest()
    if key not in known:
        step = _PAGE if tensor.nbytes > _MANY else _WORD
        known[key] = (file.seek(-(-file.tell() // step) * step), tensor.nbytes)
        _append(file, tensor)
    return known[key]


def _append(file: BinaryIO, tensor: Any) -> None:
    written = sum(file.write(piece) for piece in _pieces(tensor))
    assert written == tensor.nbytes, f"{tensor.name}: {written} bytes of {tensor.nbytes}"


def _pieces(tensor: Any) -> Iterator[Any]:
    """The bytes of a tensor, little-endian, in order. What is not laid out in order is copied piece by piece."""
    array = tensor.numpy()
    if array.nbytes != tensor.nbytes or sys.byteorder != "little":
        yield tensor.tobytes()  # several numbers to a byte, or another order
        return
    if array.flags.c_contiguous:
        yield array.reshape(-1).view(np.uint8).data
        return
    rows = max(_PIECE // max(array.nbytes // max(len(array), 1), 1), 1)
    for start in range(0, len(array), rows):
        yield np.ascontiguousarray(array[start : start + rows]).reshape(-1).view(np.uint8).data


def _is_large(tensor: Any) -> bool:
    import onnx_ir as ir

    return tensor is not None and tensor.nbytes > _LARGE and tensor.dtype != ir.DataType.STRING


def _placeholder(tensor: Any, name: str) -> Any:
    import onnx_ir as ir

    return ir.ExternalTensor("", 0, tensor.nbytes, tensor.dtype, name=name, shape=tensor.shape)


class _Swapped:
    """Meanwhile other tensors stand for these values."""

    def __init__(self, values: list[Any], tensors: list[Any]) -> None:
        self._values, self._others = values, tensors
        self._own = [v.const_value for v in values]

    def __enter__(self) -> None:
        for value, tensor in zip(self._values, self._others, strict=True):
            value.const_value = tensor

    def __exit__(self, *_: object) -> None:
        for value, tensor in zip(self._values, self._own, strict=True):
            value.const_value = tensor


def _varint(number: int) -> bytes:
    """A number as protobuf writes lengths: seven bits a byte, the lowest first."""
    result = bytearray()
    while number > 0x7F:
        result.append(number & 0x7F | 0x80)
        number >>= 7
    result.append(number)
    return bytes(result)
