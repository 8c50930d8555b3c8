"""The `triton` backend: the float32 kernels of `rlsedit_fast.kernels`, imported when they are first asked for.

No GPU has run these kernels yet (they pass in Triton's interpreter and compile for sm_80 and sm_90), so `auto` does
not pick them. Only `downdate_` is written.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _kernel() -> Any:
    """The kernel's module, or why it cannot be imported."""
    try:
        return importlib.import_module("rlsedit_fast.kernels.downdate")
    except ImportError as error:
        return f"{error}; install the package (pip install .) with triton"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32 (tf32x3 products); the upper triangle becomes the lower one's mirror."""
    if pending.shape[0]:
        _kernel().downdate_(base, pending.contiguous(), signs.contiguous())


OPS = {"downdate_": downdate_}
BATCHED = frozenset[str]()


def missing() -> str | None:
    """Why it cannot run on this machine, or None; in Triton's interpreter no GPU is needed."""
    if not (torch.cuda.is_available() or _interpreted()):
        return "there is no CUDA device (torch.cuda.is_available() is false) and TRITON_INTERPRET is not 1"
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


def refuses(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot take these tensors: the kernels are float32, on a CUDA device, over contiguous rows."""
    held = tensors[0]
    if held.device.type != ("cpu" if _interpreted() else "cuda"):
        return f"its tensors must be on a CUDA device (or the CPU under TRITON_INTERPRET=1), not on {held.device}"
    if held.dtype != torch.float32:
        return f"it computes in float32 only, this is {held.dtype}"
    if held.stride(-1) != 1:
        return f"base must have contiguous rows, its strides are {held.stride()}"
    return None
