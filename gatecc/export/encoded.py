"""Encoded: what a text is decoded for, run once in ONNX Runtime and held on its device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.onnx.place import first_line
from gatecc.errors import ArgumentError

TYPES = {
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
}
_TOKENS_MASK, _MASK = "decoder_attention_mask", "attention_mask"


class Encoded:
    """The inputs of decode.onnx that come from a text to be translated, say.

    ``described``: what the manifest says of it. ``session``: that of encoder.onnx, None if there is no such file;
    ``types``: those of the inputs of decode.onnx.
    """

    def __init__(self, described: Mapping[str, Any], session: Any, types: Mapping[str, torch.dtype], device: str):
        self.inputs: dict[str, list[int | str]] = described["inputs"]
        self._outputs: list[str] = list(described["outputs"])
        self._passed: dict[str, str] = described["passed"]
        self._session, self._device = session, device
        read = [] if session is None else session.get_inputs()
        self._types = {i.name: TYPES[i.type] for i in read}
        self._kept = {name: types[name] for name in self._passed if name in types}

    def parted(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The values per token, under the names of decode.onnx, and the inputs of the encoder."""
        given = {name: x for name, x in values.items() if name in self.inputs}
        tokens = {name: x for name, x in values.items() if name not in given}
        if _TOKENS_MASK in tokens:
            tokens[_MASK] = tokens.pop(_TOKENS_MASK)
        return tokens, given

    def refuse(self, given: Mapping[str, Tensor]) -> None:
        """Raise ArgumentError if inputs are given for a text that has begun."""
        if given:
            raise ArgumentError(
                "what a text is decoded for is given with its first tokens",
                found=", ".join(given),
                expected="a state, which holds it, and no such input",
            )

    def __call__(self, given: Mapping[str, Tensor], ids: Tensor) -> dict[str, Any]:
        """Run the encoder: values of the inputs of decode.onnx, as ONNX Runtime holds them."""
        if set(given) != set(self.inputs):
            raise ArgumentError(
                "what the text is decoded for is not what the model was exported with",
                found=", ".join(sorted(given)) or "nothing",
                expected=", ".join(self.inputs),
                do="pass these inputs by name: prefill(ids, input_ids=...)",
            )
        for name, shape in self.inputs.items():
            self._check(name, given[name], shape, len(ids))
        found = {
            name: self._value(given[of], self._kept[name]) for name, of in self._passed.items() if name in self._kept
        }
        if self._session is None:
            return found
        binding = self._session.io_binding()
        for name, dtype in self._types.items():
            binding.bind_ortvalue_input(name, self._value(given[name], dtype))
        for name in self._outputs:
            binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:
            raise ArgumentError(
                "ONNX Runtime cannot run these inputs",
                where=", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items()),
                found=f"{type(e).__name__}: {first_line(e)}",
                do="token ids must be below the size of the vocabulary",
            ) from e
        return {**found, **dict(zip(self._outputs, binding.get_outputs(), strict=True))}

    def _check(self, name: str, x: Tensor, shape: list[int | str], batch: int) -> None:
        sizes = [batch if size == "batch" else size for size in shape]
        if x.dim() != len(sizes) or any(isinstance(n, int) and n != m for n, m in zip(sizes, x.shape, strict=True)):
            raise ArgumentError(
                "an input is not of the shape that was exported",
                where=name,
                found=str(tuple(x.shape)),
                expected=f"({', '.join(map(str, sizes))})",
            )

    def _value(self, x: Tensor, dtype: torch.dtype) -> Any:
        import onnxruntime as ort

        array = x.detach().cpu().to(dtype).contiguous().numpy()
        return ort.OrtValue.ortvalue_from_numpy(array, self._device, 0)
