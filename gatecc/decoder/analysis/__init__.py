"""What the decoder finds out about a captured model: sizes that are the length, dependence, positions of axes."""
