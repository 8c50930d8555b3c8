"""The `triton` backend: the float32 kernels of `rlsedit_fast.kernels`, imported on first use.

The kernels have not run on a GPU yet (tests run them in Triton's interpreter, and their PTX for sm_80 and sm_90 on a
CPU), so `auto` uses them only where it measured on the machine that they are correct and faster. There is no `factor`:
its Cholesky factorization spills registers in Triton.

`RLSEDIT_TRITON_PRECISION` selects how products are computed: `tf32x3` (default), `bf16x6` (default of `downdate_`,
`correct_` and `moment_` on sm_90) or `ieee`; see `rlsedit_fast.kernels.precision`. Launches use torch's current stream
on the device of the tensors and do not synchronize; the only allocations are results, a workspace for `panel` and
copies of small operands whose rows are not contiguous. After a first call with the same sizes, which compiles, a call
can be captured in a CUDA graph.

The configurations are tuned for widths divisible by 16. Other widths give correct results, but with narrow loads and
register spills in large tiles.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.ops.sizes import SizeClass

MOMENT_ROWS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _kernels(name: str) -> Any:
    """Returns a kernel module, or why it cannot be imported."""
    try:
        return importlib.import_module(f"rlsedit_fast.kernels.{name}")
    except ImportError as error:
        return f"{error}; install the package (pip install .) with triton"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _rows(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a copy if its rows are not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _symmetric(matrix: Tensor) -> Tensor:
    """Returns the symmetric matrix, transposed if its columns are contiguous."""
    return matrix if matrix.stride(-1) == 1 else matrix.mT


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor) -> Tensor:
    """`reference.panel` in float32 for a batch of layers; two launches, bitwise deterministic."""
    projected: Tensor = _kernels("panel").panel(_symmetric(base), _rows(keys), _rows(pending), signs.contiguous())
    return projected


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32 for a batch of layers; the result is exactly symmetric."""
    _kernels("downdate").downdate_(_symmetric(base), _rows(pending), signs.contiguous())


def correct_(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int) -> None:
    """`reference.correct_` in float32 for a batch of layers; the weight may be a transposed view."""
    _kernels("correct").correct_(weight, _rows(whitened), _rows(rows), sign)


def correct_split_(high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int) -> None:
    """`reference.correct_split_` for a batch of layers, in one pass; the weight may be a transposed view."""
    _kernels("correct").correct_split_(high, low, _rows(whitened), _rows(rows), sign)


def moment_(moment: Tensor, rows: Tensor) -> None:
    """`reference.moment_` with float32 sums for a batch of layers; the result is exactly symmetric."""
    _kernels("moment").moment_(_symmetric(moment), _rows(rows))


OPS = {
    "panel": panel,
    "downdate_": downdate_,
    "correct_": correct_,
    "correct_split_": correct_split_,
    "moment_": moment_,
}
BATCHED = frozenset(OPS)


def unavailable_reason() -> str | None:
    """Returns why the backend cannot run on this machine, or None. Triton's interpreter needs no GPU."""
    if not (torch.cuda.is_available() or _interpreted()):
        return "no CUDA device is available (torch.cuda.is_available() is false) and TRITON_INTERPRET is not 1"
    kernel = _kernels("panel")
    return kernel if isinstance(kernel, str) else None


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Returns why the tensors are not supported: they must be float32, on CUDA, with contiguous rows or columns."""
    first = tensors[0]
    if first.device.type != ("cpu" if _interpreted() else "cuda"):
        return f"tensors must be on a CUDA device (on the CPU with TRITON_INTERPRET=1), got {first.device}"
    if first.dtype != torch.float32 and op != "correct_split_":
        return f"it computes in float32 only, got {first.dtype}"
    if op == "moment_" and any(rows.dtype not in MOMENT_ROWS for rows in tensors[1:]):
        return f"rows must be float32, bfloat16 or float16, got {tensors[1].dtype}"
    if op in ("panel", "downdate_", "moment_") and 1 not in first.stride()[-2:]:
        return f"the matrix must have contiguous rows or columns, got strides {first.stride()}"
    return None


def preferred(size: SizeClass) -> bool:
    """Returns False: nothing is recorded on a GPU yet, so `auto` uses the backend only where it measured it."""
    return False
