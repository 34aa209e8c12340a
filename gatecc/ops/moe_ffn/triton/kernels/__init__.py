"""The kernels of experts, in Triton's dialect of Python. ../launch.py launches them."""
