"""Sources of the CUDA kernels, installed as `rlsedit_fast.cuda_sources` for compilation at run time."""
