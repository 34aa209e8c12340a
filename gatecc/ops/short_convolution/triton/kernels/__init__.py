"""Kernels that gatecc.ops.short_convolution.triton.launch launches."""
