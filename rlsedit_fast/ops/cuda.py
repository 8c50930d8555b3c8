"""The `cuda` backend: float32 kernels in a C library that knows no torch, called through ctypes.

No GPU has run these kernels yet: they are compiled and their argument checks tested, no more, so `auto` does not
pick them. `panel`, `correct_` and `moment_` are not written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rlsedit_fast.errors import BackendError

LIBRARY = Path(__file__).with_name("librlsedit_cuda.so")
MOST_EDITS = 128  # `factor` keeps n x n floats in shared memory

# As in csrc/include/rlsedit/cuda.h.
_SIGNATURES = {
    "rlsedit_cuda_downdate": (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int, c_void_p),
    "rlsedit_cuda_factor": (*(c_void_p,) * 8, *(c_int64,) * 3, c_int, c_int, c_void_p),
}


@cache
def load_library(path: Path = LIBRARY) -> ctypes.CDLL | str:
    """The library, ready to call, or why it cannot be loaded. It loads without a driver too."""
    if not path.exists():
        return "its library was not built; `python -m rlsedit_fast` says why"
    try:
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
        library.rlsedit_cuda_last_error.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return f"its library cannot be loaded ({error}); reinstall the package to build it anew"
    return library


def call(name: str, *arguments: int | None) -> None:
    """Calls a function of the library.

    Raises:
        BackendError: there is no library, an argument is bad or CUDA refused; the text says which.
    """
    library = load_library()
    if isinstance(library, str):
        raise BackendError(f"{name} cannot be called: {library}")
    if getattr(library, name)(*arguments):
        raise BackendError(library.rlsedit_cuda_last_error().decode())


def _where(tensor: Tensor) -> tuple[int, int]:
    """The device's index and torch's current stream on it."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32; the upper triangle becomes the mirror of the lower one."""
    pending, signs = pending.contiguous(), signs.contiguous()
    call(
        "rlsedit_cuda_downdate",
        *(base.data_ptr(), base.stride(0), pending.data_ptr(), base.shape[0], signs.data_ptr()),
        *(base.shape[0], pending.shape[0], *_where(base)),
    )


def factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.factor` in float32 for n of 1 to `MOST_EDITS`."""
    n, d_k = projected.shape
    projected, innovation, noise = projected.contiguous(), innovation.contiguous(), noise.contiguous()
    gram = projected @ keys.T
    u, a, lower = torch.empty_like(projected), torch.empty_like(innovation), torch.empty_like(gram)
    info = torch.empty((), dtype=torch.int32, device=projected.device)
    operands = (gram, noise, projected, innovation, u, a, lower, info)
    call(
        "rlsedit_cuda_factor",
        *(operand.data_ptr() for operand in operands),
        *(n, d_k, innovation.shape[1], sign, *_where(projected)),
    )
    return u, a, lower, info


OPS = {"factor": factor, "downdate_": downdate_}
BATCHED = frozenset[str]()


def missing() -> str | None:
    """Why it cannot run on this machine, or None."""
    library = load_library()
    if isinstance(library, str):
        return library
    return None if torch.cuda.is_available() else "there is no CUDA device (torch.cuda.is_available() is false)"


def refuses(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot take these tensors: the kernels are float32, on a CUDA device, over contiguous rows."""
    held = tensors[0]
    if held.device.type != "cuda":
        return f"its tensors must be on a CUDA device, these are on {held.device}"
    if held.dtype != torch.float32:
        return f"it computes in float32 only, this is {held.dtype}"
    if op == "factor" and not 1 <= held.shape[-2] <= MOST_EDITS:
        return f"it factors 1 to {MOST_EDITS} edits at once, these are {held.shape[-2]}"
    if op == "downdate_" and held.stride(-1) != 1:
        return f"base must have contiguous rows, its strides are {held.stride()}"
    return None
