"""Graphs and kernels written out. Codegen reads a finished Program and never runs a pass.

Importing this makes the kernels known to the operators that they belong to.
"""

from gatecc.codegen import c, triton

__all__ = ["c", "triton"]
