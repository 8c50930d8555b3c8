"""Runs compiled GPU kernels (PTX) on a CPU, checks every access to memory, and counts what a GPU would do.

`parser` reads the PTX of a kernel, `translation` translates it to the instructions (`operations`) of the interpreter in
`machine/`, and `machine` compiles and calls the interpreter. `launches` are launches that can be repeated.
`cuda_kernels` and `triton_kernels` run the package's kernels, `cases` has a small launch of each, `mistakes` removes
barriers, fences and waits, and `counting` sums up counts.

docs/kernels.md describes what this checks and what it cannot show.
"""
