"""Every mode of a call x every wrapper x some recipes: each cell works or is refused with a code.

``python -m tests.compatibility`` runs all cells and writes docs/compatibility.md; test_cells.py runs a pairwise cover.
"""
