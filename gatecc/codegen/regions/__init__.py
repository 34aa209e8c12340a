"""Regions: parts of a graph as GPU kernels, one readable Python file each, printed from the graph.

A region is pointwise operators and reductions of rows, alone (``rowwise``) or around products of matrices with one main
loop (``matmul``). There is no template per pattern: what a region computes is printed from one table of expressions.
The file has the kernel, its launcher, the same in ATen, and the registration as an operator, whose form on a CPU is
ATen, so that Inductor fuses it there. What cannot be printed is refused with a reason. Needs no Triton; importing a
file does.
"""
