"""The kernels of linear attention, in Triton's dialect of Python. ../launch.py launches them."""
