"""Triton kernels and their configuration tables, installed as `rlsedit_fast.kernels`."""
