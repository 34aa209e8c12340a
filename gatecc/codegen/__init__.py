"""Graphs and kernels written out. Codegen reads a finished Program and never runs a pass."""
