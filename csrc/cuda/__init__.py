"""The CUDA kernels' sources, installed as `rlsedit_fast.cuda_sources` to be compiled where no library was built."""
