"""Runs compiled GPU kernels (PTX) on a CPU, checks every access to memory, and counts what a GPU would do.

`parser` reads the PTX of a kernel, `translation` translates it to the instructions of the interpreter in `machine/`,
`machine` compiles and calls the interpreter. `cuda_kernels` and `triton_kernels` run the package's kernels with it, and
`mistakes` removes barriers, fences and waits.

docs/kernels.md describes what this checks and what it cannot show.
"""
