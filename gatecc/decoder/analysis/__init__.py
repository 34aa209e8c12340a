"""What the decoder knows of a captured model: sizes that are the length, dependence on tokens, positions of axes."""
