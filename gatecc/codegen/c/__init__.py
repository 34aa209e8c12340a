"""Kernels in plain C, built by the system's compiler when they are first needed."""
