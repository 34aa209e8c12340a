"""The CPU kernels of ``gatecc::short_convolution``, in C."""
