"""Tidying an ONNX graph that torch.onnx wrote: what is constant is computed, what nobody reads goes."""

from gatecc.codegen.onnx.tidy.run import tidy

__all__ = ["tidy"]
