"""Reweight: edits of weights: rows that are shifted, groups that are masked."""
