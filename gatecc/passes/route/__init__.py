"""Route: a dense part of a model becomes k of E experts per token."""
