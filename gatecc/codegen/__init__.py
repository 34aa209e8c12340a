"""Toolchains that know no operator: C sources built and loaded, graphs written as ONNX. Codegen never runs a pass."""
