"""Rewrites, one per file, and what they share. A pass edits a Program and knows neither ONNX nor Triton.

Importing this package registers every rewrite, mixer and body of a branch by its name.
"""

from gatecc.ir.discover import discover

discover(__name__, __path__)
