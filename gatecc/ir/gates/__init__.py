"""The six choices that make a gate (source, scorer, granularity, activation, estimator, init), one per file."""
