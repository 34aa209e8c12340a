"""Operators of namespace gatecc, one a file. Importing this package registers them."""

from gatecc.ops import estimators, recurrent

__all__ = ["estimators", "recurrent"]
