"""The decoder that a user holds: its state, and generation with it."""
