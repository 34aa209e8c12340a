"""What Triton kernels of all operators share: how they are launched, and the tables of their sizes. Without Triton."""
