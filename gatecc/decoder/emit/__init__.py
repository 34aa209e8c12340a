"""The step program, written out."""
