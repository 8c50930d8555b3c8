"""The `cpu` backend: native float32 kernels where they beat PyTorch, PyTorch (`reference`) elsewhere.

`panel` is native: PyTorch reads all of the symmetric `C_base`, the kernel one triangle. `downdate_` and `moment_` of a
high rank are SSYRK and a native mirror pass, half of a product's work. `correct_split_` is native: one pass over the
halves instead of a dozen. `factor` is PyTorch with a substitution by blocks, whose work is in products. `correct_` is a
BLAS call in PyTorch already, on operands that have no triangle to leave out.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlsedit_fast.errors import BackendError
from rlsedit_fast.ops import reference

# Numbers of edits at which the native panel beats torch's: on an AMD machine torch takes 1.5 times as long at 128, 1.1
# to 1.3 times at 256 (bench/results/panel-cpu.json). On an Intel one, where torch's products are faster, earlier
# versions were at 1.14 times at 64 and 0.95 at 100 on two threads (panel-cpu-intel.json), and at 1.35 times at 128 and
# 0.71 at 256 on one (panel-crossover-cpu.json).
NATIVE_PANEL_EDITS = range(1, 129)

_SMALL = 1 << 20  # floats, whose reading is nothing

# Edits in a block of the substitution.
SUBSTITUTED_EDITS = 32

# Rank, and work d^2 r, from which SSYRK and the mirror pass beat torch's product, by 1.3 to 2 times. At two thirds of
# that work they are about even, at less behind: BLAS's threads have to be woken (bench/results/downdate-cpu.json,
# moment-cpu.json).
SYRK_RANK = 256
SYRK_WORK = 3e9

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
    """`reference.panel` in float32, reading the lower triangle of `base` where the native kernel is faster."""
    n, d = keys.shape
    # Every thread has a sum of its own: with very many they would be read and written like C itself.
    if n not in NATIVE_PANEL_EDITS or 2 * _native.panel_workspace(d, n, torch.get_num_threads()) > max(d * d, _SMALL):
        return reference.panel(base, keys, pending, signs)
    projected = native_panel(base, keys)
    if pending.shape[0]:
        projected.addmm_((keys @ pending.T) * signs, pending, alpha=-1)
    return projected


def factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.factor`, whitened block by block: BLAS's substitution into few long rows runs far below a product."""
    gram = projected @ keys.T
    sigma = torch.diag(noise) + (0.5 * sign) * (gram + gram.T)
    lower, info = torch.linalg.cholesky_ex(sigma)
    return substituted(lower, projected), substituted(lower, innovation), lower.contiguous(), info


def substituted(lower: Tensor, rows: Tensor) -> Tensor:
    """`L^-1 X [n, d]` of `L [n, n]` and `X [n, d]`, by blocks of which those on the diagonal are inverted.

    Its backward errors are those of a substitution row by row, also where keys are all but parallel: L comes from a
    Cholesky factorisation, whose diagonal blocks are well conditioned once scaled.
    """
    solved = rows.clone(memory_format=torch.contiguous_format)
    for start in range(0, len(lower), SUBSTITUTED_EDITS):
        block = slice(start, start + SUBSTITUTED_EDITS)
        here, diagonal = solved[block], lower[block, block]
        if start:
            here.addmm_(lower[block, :start], solved[:start], alpha=-1)
        inverse = torch.linalg.solve_triangular(diagonal, diagonal.new_ones(len(diagonal)).diag(), upper=False)
        here.copy_(inverse @ here)
    return solved


def syrk_downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32 by BLAS's SSYRK, half of a product's work; then the mirror of its triangle.

    Args:
        base: contiguous `[d, d]`; afterwards exactly symmetric.
        pending: `U_p [r, d]`.
        signs: `[r]`, each +1 or -1.
    """
    each = []
    for sign in (1, -1):
        those = signs == sign
        # Nearly always all are edits, and a choice among them would be a copy.
        each.append((pending if those.all() else pending[those]).contiguous())
    for sign, rows in zip((1, -1), each, strict=True):  # what may find no memory lies before the first write
        _syrk_(base, rows, -float(sign))
    _mirror_(base)


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32, by the faster of SSYRK and torch's product."""
    if _is_for_syrk(base, pending):
        syrk_downdate_(base, pending, signs)
    else:
        reference.downdate_(base, pending, signs)


def syrk_moment_(moment: Tensor, rows: Tensor) -> None:
    """`reference.moment_` in float32 by BLAS's SSYRK, half of a product's work; then the mirror of its triangle.

    Args:
        moment: contiguous `[d, d]`; afterwards exactly symmetric.
        rows: `X [t, d]`, of any floating dtype.
    """
    _syrk_(moment, rows.to(moment.dtype), 1.0)
    _mirror_(moment)


def moment_(moment: Tensor, rows: Tensor) -> None:
    """`reference.moment_` in float32, by the faster of SSYRK and torch's product."""
    if _is_for_syrk(moment, rows):
        syrk_moment_(moment, rows)
    else:
        reference.moment_(moment, rows)


def correct_split_(
    high: Tensor, low: Tensor, whitened: Tensor, rows: Tensor, sign: int, isa: str = "automatic"
) -> None:
    """`reference.correct_split_` in one pass over the halves, which lie row by row or column by column.

    Args:
        high: bfloat16 `[d_v, d_k]`.
        low: int16 `[d_v, d_k]`, with the strides of `high`.
        whitened: `A [n, d_v]`, float32.
        rows: `U [n, d_k]`, float32.
        sign: +1 or -1.
        isa: as in `native_panel`.
    """
    if high.stride(1) != 1:  # the weight of a Conv1D, seen transposed
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


def _is_for_syrk(matrix: Tensor, rows: Tensor) -> bool:
    return len(rows) >= SYRK_RANK and rows.numel() * len(matrix) >= SYRK_WORK and matrix.is_contiguous()


def _syrk_(matrix: Tensor, rows: Tensor, scale: float) -> None:
    """Adds `scale * rows^T rows` to the lower triangle of a contiguous `matrix [d, d]`; `rows [r, d]`."""
    from scipy.linalg import blas  # takes a while, and the first long flush is soon enough

    if not rows.shape[0]:
        return
    # BLAS counts columns first: to it the transposed view's upper triangle is the lower one of our rows.
    transposed = rows.detach().contiguous().numpy().T
    written = blas.ssyrk(scale, transposed, beta=1.0, c=matrix.detach().numpy().T, lower=0, overwrite_c=1)
    if written.ctypes.data != matrix.data_ptr():
        raise BackendError("scipy's ssyrk wrote to a copy, not in place: ask for backend='reference'")


def _mirror_(matrix: Tensor) -> None:
    """Copies the lower triangle of a contiguous `matrix [d, d]` onto the upper one."""
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
    """Why the extension cannot be used, or is not worth using, or None."""
    if _problem is None and not getattr(_native, "openmp", True) and torch.get_num_threads() > 1:
        return f"it was built without OpenMP, for one thread, and PyTorch has {torch.get_num_threads()}"
    return _problem


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot take these tensors: the kernels are float32, on the CPU, over contiguous rows."""
    held = tensors[-1] if op == "correct_split_" else tensors[0]  # not its halves, but what it computes in
    if held.device.type != "cpu":
        return f"its tensors must be on the CPU, these are on {held.device}"
    if held.dtype != torch.float32:
        return f"it computes in float32 only, this is {held.dtype}"
    if op == "panel" and held.stride(-1) != 1:
        return f"base must have contiguous rows, its strides are {held.stride()}"
    if op == "correct_split_":
        high, low = tensors[:2]
        if high.stride() != low.stride() or 1 not in high.stride()[-2:]:
            return f"high and low must have equal strides, one of them 1; they have {high.stride()} and {low.stride()}"
    return None
