"""Judge: Triton kernels held to what a GPU asks of them, on a machine without one.

``compiled`` compiles what a launch would compile for the GPUs of both makers, and reads what it takes: registers,
spills, shared memory, instructions of matrix units. ``interpreted`` runs kernels in Triton's interpreter and finds
accesses outside of the tensors that they were given, and addresses that two programs write. Both import Triton.
"""
