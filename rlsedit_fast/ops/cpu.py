"""The `cpu` backend: native float32 kernels.

`panel` is native and reads one triangle of the symmetric `C_base`, where PyTorch reads all of it. `downdate_`
and `moment_` use SSYRK and a native mirror pass, half the work of a matrix product. `correct_split_` is native, one
pass over the halves. `factor` is PyTorch with a blocked substitution that spends its time in matrix products.
`correct_` is a BLAS call in PyTorch already.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.errors import BackendError
from rlsedit_fast.ops import reference
from rlsedit_fast.ops.sizes import SizeClass

# Most edits for which the native panel is the default; machines differ, so `auto` measures. Speedup over torch: on an
# AMD machine 1.5 at 128 edits and 1.1 to 1.3 at 256 (bench/results/panel-cpu.json); on an Intel machine (earlier
# versions) 1.14 at 64 and 0.95 at 100 with two threads (panel-cpu-intel.json), 1.35 at 128 and 0.71 at 256 with one
# thread (panel-crossover-cpu.json).
PANEL_EDITS = 128

_SMALL = 1 << 20  # workspace floats whose memory traffic is negligible

SUBSTITUTION_BLOCK = 32  # edits per block of the substitution

# Minimum rank r and work d^2 r for which SSYRK and the mirror pass are the default, 1.3 to 2 times as fast as torch's
# product. At two thirds of that work they are even, at less they are slower because BLAS threads have to wake up
# (bench/results/downdate-cpu.json, moment-cpu.json).
SYRK_RANK = 256
SYRK_WORK = 3e9

_native: Any = None
_problem: str | None = None
try:
    # Imported after torch so that both share one OpenMP runtime and thread pool.
    _native = importlib.import_module("rlsedit_fast.ops._cpu")
except ImportError as error:
    _problem = f"its native extension cannot be imported ({error}); `python -m rlsedit_fast` shows the build report"


def runs(isa: str) -> bool:
    """Returns whether this processor supports the instruction set `isa`: portable, avx2 or avx512."""
    return bool(_native.runs(getattr(_native.Isa, isa)))


def native_panel(base: Tensor, keys: Tensor, isa: str = "automatic") -> Tensor:
    """Computes `K C_base` from the lower triangle; bitwise deterministic for a given thread count.

    Args:
        base: `C_base [d_k, d_k]`, float32, with contiguous rows.
        keys: `K [n, d_k]`, float32.
        isa: a supported instruction set (see `runs`), or `automatic`.

    Returns:
        `[n, d_k]`, float32.
    """
    n, d = keys.shape
    keys = keys.contiguous()
    projected = torch.empty_like(keys)
    threads = torch.get_num_threads()
    workspace = torch.empty(_native.panel_workspace(d, n, threads), dtype=torch.float32, device="cpu")
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
    """`reference.panel` in float32; reads only the lower triangle of `base`, unless its sums would be as large."""
    n, d = keys.shape
    if n == 0 or not _sums_fit(d, n):
        return reference.panel(base, keys, pending, signs)
    projected = native_panel(base, keys)
    if pending.shape[0]:
        projected.addmm_((keys @ pending.T) * signs, pending, alpha=-1)
    return projected


def _sums_fit(d: int, n: int) -> bool:
    """Returns whether the sums of a native panel, which every thread has, are small compared to C."""
    return 2 * int(_native.panel_workspace(d, n, torch.get_num_threads())) <= max(d * d, _SMALL)


def factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.factor` with a blocked substitution: BLAS solves a few long rows much slower than it multiplies."""
    gram = projected @ keys.T
    sigma = (gram + gram.T).mul_(0.5 * sign)
    sigma.diagonal().add_(noise)
    lower, info = torch.linalg.cholesky_ex(sigma)
    return *solve_blocked(lower, projected, innovation), lower, info


def solve_blocked(lower: Tensor, *sides: Tensor) -> tuple[Tensor, ...]:
    """Computes `L^-1 X` for several X by forward substitution with inverted diagonal blocks.

    The backward error is that of a row-by-row substitution, even for nearly parallel keys: the diagonal blocks of a
    Cholesky factor are well conditioned after scaling.

    Args:
        lower: `L [n, n]`, lower triangular.
        sides: `X [n, d]` each.

    Returns:
        `[n, d]` each, contiguous.
    """
    solved = tuple(torch.empty_like(side, memory_format=torch.contiguous_format) for side in sides)
    for start in range(0, len(lower), SUBSTITUTION_BLOCK):
        block = slice(start, start + SUBSTITUTION_BLOCK)
        diagonal = lower[block, block]
        identity = torch.eye(len(diagonal), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(diagonal, identity, upper=False)
        for side, done in zip(sides, solved, strict=True):
            here = side[block]
            if start:
                here = torch.addmm(here, lower[block, :start], done[:start], alpha=-1)
            torch.mm(inverse, here, out=done[block])
    return solved


def syrk_downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32 by BLAS's SSYRK (half the work of a product) and a mirror pass.

    Args:
        base: `[d, d]`, contiguous; exactly symmetric afterwards.
        pending: `U_p [r, d]`.
        signs: `[r]`, each +1 or -1.
    """
    each = []
    for sign in (1, -1):
        those = signs == sign
        # Almost always all rows are updates; indexing would copy them.
        each.append((pending if those.all() else pending[those]).contiguous())
    for sign, rows in zip((1, -1), each, strict=True):  # allocations come before the first write
        _syrk_(base, rows, -float(sign))
    _mirror_(base)


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32 with SSYRK, or with torch if the matrix is not contiguous."""
    if base.is_contiguous():
        syrk_downdate_(base, pending, signs)
    else:
        reference.downdate_(base, pending, signs)


def syrk_moment_(moment: Tensor, rows: Tensor) -> None:
    """`reference.moment_` in float32 by BLAS's SSYRK (half the work of a product) and a mirror pass.

    Args:
        moment: `[d, d]`, contiguous; exactly symmetric afterwards.
        rows: `X [t, d]`, any floating dtype.
    """
    _syrk_(moment, rows.to(moment.dtype), 1.0)
    _mirror_(moment)


def moment_(moment: Tensor, rows: Tensor) -> None:
    """`reference.moment_` in float32 with SSYRK, or with torch if the matrix is not contiguous."""
    if moment.is_contiguous():
        syrk_moment_(moment, rows)
    else:
        reference.moment_(moment, rows)


def correct_split_(
    high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int, isa: str = "automatic"
) -> None:
    """`reference.correct_split_` in one pass over the halves, which are row-major or column-major.

    Args:
        high: `[d_v, d_k]`, bfloat16.
        low: `[d_v, d_k]`, int16, with the strides of `high`.
        whitened: `A [n, d_v]`, float32.
        rows: `U [n, d_k]`, float32.
        sign: +1 or -1.
        isa: as in `native_panel`.
    """
    if high.stride(1) != 1:  # transposed view of a Conv1D weight
        high, low, whitened, rows = high.T, low.T, rows, whitened
    threads = torch.get_num_threads()
    whitened, rows = whitened.contiguous(), rows.contiguous()
    workspace = torch.empty(threads * _native.correct_split_workspace_per_thread, dtype=torch.float32, device="cpu")
    _native.correct_split(
        high=high.data_ptr(),
        low=low.data_ptr(),
        stride=high.stride(0),
        whitened=whitened.data_ptr(),
        rows=rows.data_ptr(),
        workspace=workspace.data_ptr(),
        d_v=high.shape[0],
        d_k=high.shape[1],
        n=rows.shape[0],
        sign=sign,
        threads=threads,
        isa=getattr(_native.Isa, isa),
    )


def _syrk_(matrix: Tensor, rows: Tensor, scale: float) -> None:
    """Adds `scale * rows^T rows` to the lower triangle of a contiguous `matrix [d, d]`, for `rows [r, d]`."""
    from scipy.linalg import blas  # slow import, deferred to the first long flush

    if not rows.shape[0]:
        return
    # BLAS is column-major: the upper triangle of the transposed view is the lower triangle of the row-major matrix.
    transposed = rows.detach().contiguous().numpy().T
    written = blas.ssyrk(scale, transposed, beta=1.0, c=matrix.detach().numpy().T, lower=0, overwrite_c=1)
    if written.ctypes.data != matrix.data_ptr():
        raise BackendError("scipy's ssyrk wrote to a copy instead of in place; use backend='reference'")


def _mirror_(matrix: Tensor) -> None:
    """Copies the lower triangle of a contiguous `matrix [d, d]` to the upper triangle."""
    _native.mirror(base=matrix.data_ptr(), stride=matrix.stride(0), d=matrix.shape[0], threads=torch.get_num_threads())


OPS = {
    **reference.OPS,
    "panel": panel,
    "factor": factor,
    "downdate_": downdate_,
    "correct_split_": correct_split_,
    "moment_": moment_,
}
BATCHED = frozenset[str]()


def unavailable_reason() -> str | None:
    """Returns why the extension cannot or should not be used, or None."""
    if _problem is None and not getattr(_native, "openmp", True) and torch.get_num_threads() > 1:
        return f"it was built without OpenMP (one thread), but PyTorch uses {torch.get_num_threads()} threads"
    return _problem


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Returns why the tensors are not supported: they must be float32, on the CPU, with contiguous rows."""
    tensor = tensors[-1] if op == "correct_split_" else tensors[0]  # rows, not the bfloat16 half
    if tensor.device.type != "cpu":
        return f"tensors must be on the CPU, got {tensor.device}"
    if tensor.dtype != torch.float32:
        return f"it computes in float32 only, got {tensor.dtype}"
    if op == "panel" and tensor.stride(-1) != 1:
        return f"base must have contiguous rows, got strides {tensor.stride()}"
    if op == "correct_split_":
        high, low = tensors[:2]
        if high.stride() != low.stride() or 1 not in high.stride()[-2:]:
            return f"high and low must have equal strides, one of them 1, got {high.stride()} and {low.stride()}"
    return None


def preferred(size: SizeClass) -> bool:
    """Returns whether the native kernel was faster than torch on the machines of the recorded benchmarks."""
    if size.op == "panel":
        return size.rows <= PANEL_EDITS and _sums_fit(size.widths[0], size.rows)
    if size.op in ("downdate_", "moment_"):
        return size.rows >= SYRK_RANK and size.work >= SYRK_WORK
    return True
