"""The ways to choose experts, one per file: importing this package makes all of them known by name."""

from gatecc.ir.discover import discover

discover(__name__, __path__)
