"""Masks classified: evaluated at several sizes with telling inputs, and named by what that shows."""
