"""The Triton kernels and their tables of configurations, installed as `rlsedit_fast.kernels`."""
