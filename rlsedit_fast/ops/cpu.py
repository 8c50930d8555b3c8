"""The `cpu` backend: native float32 kernels where they beat PyTorch, PyTorch (`reference`) elsewhere.

`panel` is native: PyTorch reads all of the symmetric `C_base`, the kernel one triangle. `factor`, `correct_` and
`moment_` are BLAS calls in PyTorch already, on operands that have no triangle to leave out.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.ops import reference

# Edits beyond which torch is faster.
NATIVE_PANEL_LIMIT = 64

_native: Any = None
_problem: str | None = None
try:
    # After torch, whose OpenMP it then finds in the process: one pool of threads, not two that fight.
    _native = importlib.import_module("rlsedit_fast.ops._cpu")
except ImportError as error:
    _problem = f"its native extension cannot be imported ({error}); `python -m rlsedit_fast` says what the build did"


def runs(isa: str) -> bool:
    """Whether this processor has the instruction set `isa`: portable, avx2 or avx512."""
    return bool(_native.runs(getattr(_native.Isa, isa)))


def native_panel(base: Tensor, keys: Tensor, isa: str = "automatic") -> Tensor:
    """`K C_base [n, d_k]` in float32, reading the lower triangle only; the same bits for the same thread count.

    Args:
        base: `C_base [d_k, d_k]` with contiguous rows.
        keys: `K [n, d_k]`.
        isa: the instruction set, one that `runs`; by default the best for this n.
    """
    n, d = keys.shape
    keys = keys.contiguous()
    projected = torch.empty_like(keys)
    threads = torch.get_num_threads()
    workspace = torch.empty(_native.panel_workspace(d, n, threads), dtype=torch.float32)
    _native.panel(
        base=base.data_ptr(),
        stride=base.stride(0),
        keys=keys.data_ptr(),
        out=projected.data_ptr(),
        workspace=workspace.data_ptr(),
        d=d,
        n=n,
        threads=threads,
        isa=getattr(_native.Isa, isa),
    )
    return projected


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor) -> Tensor:
    """`reference.panel` in float32, reading the lower triangle of `base` where the native kernel is faster."""
    if keys.shape[0] > NATIVE_PANEL_LIMIT:
        return reference.panel(base, keys, pending, signs)
    projected = native_panel(base, keys)
    if pending.shape[0]:
        projected.addmm_((keys @ pending.T) * signs, pending, alpha=-1)
    return projected


OPS = {**reference.OPS, "panel": panel}


def missing() -> str | None:
    """Why the extension cannot be used, or None."""
    return _problem


def refuses(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot take these tensors: the kernels are float32, on the CPU, over contiguous rows."""
    held = tensors[0]
    if held.device.type != "cpu":
        return f"its tensors must be on the CPU, these are on {held.device}"
    if held.dtype != torch.float32:
        return f"it computes in float32 only, this is {held.dtype}"
    if op == "panel" and held.stride(1) != 1:
        return f"base must have contiguous rows, its strides are {held.stride()}"
    return None
