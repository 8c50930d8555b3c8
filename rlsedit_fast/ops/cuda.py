"""The `cuda` backend: float32 CUDA C++ kernels, from a prebuilt library or compiled at run time.

The kernels have not run on a GPU yet (they compile for every target, and tests execute their PTX on a CPU), so `auto`
uses them only where it measured on the machine that they are correct and faster. `panel` supports only a few edits, too
few for matrix units. `correct_` and `moment_` are left to the Triton kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from rlsedit_fast.ops import cuda_launch, cuda_plan
from rlsedit_fast.ops.cuda_plan import MAX_EDITS, MAX_LAYERS, MAX_PANEL_EDITS
from rlsedit_fast.ops.sizes import SizeClass

MIN_CAPABILITY = (8, 0)
"""Compute capability that the kernels are compiled for; devices before it have too little shared memory."""


def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor) -> Tensor:
    """`reference.panel` in float32 for a batch of layers with 1 to `MAX_PANEL_EDITS` edits each.

    The kernel reads the upper triangle of `C_base` once; torch applies the pending correction.
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
    """`reference.factor` in float32 for a batch of layers with 1 to `MAX_EDITS` edits each."""
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
    """`reference.downdate_` in float32 for a batch of layers; the result is exactly symmetric."""
    if pending.shape[1]:
        cuda_launch.run(cuda_plan.downdate(base, pending.contiguous(), signs.contiguous()), base.device)


OPS = {"panel": panel, "factor": factor, "downdate_": downdate_}
BATCHED = frozenset(OPS)


def kernels() -> str | None:
    """Returns where the kernels come from on this machine, or None if they are not available."""
    found = cuda_launch.launcher()
    return None if isinstance(found, str) else found.origin


@cache
def _too_old(device: int) -> str | None:
    """Returns why the capability of a CUDA device does not suffice, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_CAPABILITY:
        return None
    have, need = (".".join(map(str, each)) for each in (capability, MIN_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} has compute capability {have}; the kernels need {need} or higher"


@cache
def _problem(device: int | None) -> str | None:
    """See `Launcher.problem`; None if there is no launcher."""
    found = cuda_launch.launcher()
    return None if isinstance(found, str) else found.problem(device)


def unavailable_reason() -> str | None:
    """Returns why the backend cannot run on this machine, or None: kernels, devices, driver and compute capability."""
    found = cuda_launch.launcher()
    if isinstance(found, str):
        return found
    if not torch.cuda.is_available():
        return "no CUDA device is available (torch.cuda.is_available() is false)"
    reasons = [_too_old(device) for device in range(torch.cuda.device_count())]
    return _problem(None) or (reasons[0] if all(reasons) else None)


def unsupported_reason(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Returns why the tensors are not supported: they must be float32, on a CUDA device, with contiguous rows."""
    first = tensors[0]
    if first.device.type != "cuda":
        return f"tensors must be on a CUDA device, got {first.device}"
    if reason := _too_old(first.device.index) or _problem(first.device.index):
        return reason
    if first.dtype != torch.float32:
        return f"it computes in float32 only, got {first.dtype}"
    if 0 in first.shape or (first.dim() == 3 and first.shape[0] > MAX_LAYERS):
        return f"expected 1 to {MAX_LAYERS} layers with at least 1 edit and 1 column, got shape {list(first.shape)}"
    if op == "factor" and first.shape[-2] > MAX_EDITS:
        return f"it factors at most {MAX_EDITS} edits at once, got {first.shape[-2]}"
    if op == "panel" and not 1 <= tensors[1].shape[-2] <= MAX_PANEL_EDITS:
        return f"its panel supports 1 to {MAX_PANEL_EDITS} edits, got {tensors[1].shape[-2]}"
    if op in ("panel", "downdate_") and first.stride(-1) != 1:
        return f"base must have contiguous rows, got strides {first.stride()}"
    return None


def preferred(size: SizeClass) -> bool:
    """Returns False: nothing is recorded on a GPU yet, so `auto` uses the backend only where it measured it."""
    return False
