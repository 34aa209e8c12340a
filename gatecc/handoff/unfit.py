"""What an architecture of transformers does not compute."""

from __future__ import annotations


class UnfitError(Exception):
    """A model, or a part of it, is not what an architecture computes; the text says what does not fit."""
