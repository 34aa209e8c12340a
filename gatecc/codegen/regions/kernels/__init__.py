"""What generated kernels call."""
