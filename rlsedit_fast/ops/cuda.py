"""The `cuda` backend: float32 kernels in CUDA C++ that know no torch, from a library or compiled at run time.

No GPU has run these kernels yet: they are compiled for every target, and run on the host block by block in tests, so
`auto` does not pick them. `panel` is for few edits, where matrix units would have nothing to do. `correct_` and
`moment_` are products with a light epilogue and no triangle to solve, which the Triton kernels have already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlsedit_fast.ops import cuda_launch, cuda_plan
from rlsedit_fast.ops.cuda_plan import MOST_EDITS, MOST_LAYERS, MOST_PANEL_EDITS


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor) -> Tensor:
    """`reference.panel` in float32 for a batch of layers with 1 to `MOST_PANEL_EDITS` edits in each.

    Of `C_base` the upper triangle is read, once; the pending correction is torch's own products.
    """
    keys, projected = keys.contiguous(), torch.empty_like(keys, memory_format=torch.contiguous_format)
    column_parts, row_parts = (keys.new_empty(shape) for shape in cuda_plan.panel_workspace(*keys.shape))
    cuda_launch.run(cuda_plan.panel(base, keys, projected, (column_parts, row_parts)), base.device)
    if pending.shape[1]:
        projected.baddbmm_((keys @ pending.mT) * signs[:, None], pending, alpha=-1)
    return projected


def factor(
    projected: Tensor, keys: Tensor, innovation: Tensor, noise: Tensor, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.factor` in float32 for a batch of layers, with 1 to `MOST_EDITS` edits in each."""
    layers, n, d_k = projected.shape
    projected, keys, innovation, noise = (t.contiguous() for t in (projected, keys, innovation, noise))
    lower = projected.new_empty(layers, n, n)
    info = torch.empty(layers, dtype=torch.int32, device=projected.device)
    outputs = (torch.empty_like(projected), torch.empty_like(innovation), lower, info)
    partial, sigma = (projected.new_empty(shape) for shape in cuda_plan.factor_workspace(layers, n, d_k))
    launches = cuda_plan.factor(projected, keys, innovation, noise, sign, outputs, (partial, sigma))
    cuda_launch.run(launches, projected.device)
    return outputs


def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
    """`reference.downdate_` in float32 for a batch of layers; the lower triangle becomes the upper one's mirror."""
    if pending.shape[1]:
        cuda_launch.run(cuda_plan.downdate(base, pending.contiguous(), signs.contiguous()), base.device)


OPS = {"panel": panel, "factor": factor, "downdate_": downdate_}
BATCHED = frozenset(OPS)


def kernels() -> str | None:
    """Where the kernels come from on this machine, or None if nowhere."""
    found = cuda_launch.launcher()
    return None if isinstance(found, str) else found.origin


def unavailable_reason() -> str | None:
    """Why it cannot run on this machine, or None."""
    found = cuda_launch.launcher()
    if isinstance(found, str):
        return found
    return None if torch.cuda.is_available() else "there is no CUDA device (torch.cuda.is_available() is false)"


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot take these tensors: the kernels are float32, on a CUDA device, over contiguous rows."""
    held = tensors[0]
    if held.device.type != "cuda":
        return f"its tensors must be on a CUDA device, these are on {held.device}"
    if held.dtype != torch.float32:
        return f"it computes in float32 only, this is {held.dtype}"
    if 0 in held.shape or (held.dim() == 3 and held.shape[0] > MOST_LAYERS):
        return f"it takes 1 to {MOST_LAYERS} layers of 1 edit and 1 column or more, these are {list(held.shape)}"
    if op == "factor" and held.shape[-2] > MOST_EDITS:
        return f"it factors up to {MOST_EDITS} edits at once, these are {held.shape[-2]}"
    if op == "panel" and not 1 <= tensors[1].shape[-2] <= MOST_PANEL_EDITS:
        return f"its panel is for 1 to {MOST_PANEL_EDITS} edits, these are {tensors[1].shape[-2]}"
    if op in ("panel", "downdate_") and held.stride(-1) != 1:
        return f"base must have contiguous rows, its strides are {held.stride()}"
    return None
