"""The kernels of attention, in Triton's dialect of Python. ../launch.py launches them."""
