"""Rewrites, one a file. A pass edits a Program and knows neither ONNX nor Triton: those are codegen's."""
