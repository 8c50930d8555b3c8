"""Measures all backends of a device at the sizes of common models, for `rlsedit doctor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.files import cache_folder
from rlsedit_fast.ops import dispatch
from rlsedit_fast.ops.choices import Choice
from rlsedit_fast.ops.precision import full_float32
from rlsedit_fast.ops.selection import SMALLEST
from rlsedit_fast.ops.sizes import SizeClass, problem

WIDTHS = ((2048, 1024), (4096, 1024), (14336, 4096))
"""d_k and d_v of the projections."""

EDITS = (1, 8, 16, 32, 64, 128, 256, 512)
PENDING = (128, 256, 512)
TOKENS = 4096
SECONDS = 0.5
"""Time of a timing, of each size."""


def devices() -> list[torch.device]:
    """Returns the CPU and the CUDA devices that differ from each other."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        every = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        found += {str(dispatch.choices_of(device).path): device for device in reversed(every)}.values()
    return found


def sizes() -> list[SizeClass]:
    """Returns the size classes that are measured, without those that are too small to matter."""
    found = dict[SizeClass, None]()
    for d_k, d_v in WIDTHS:
        every = [
            *(SizeClass("panel", (d_k,), n) for n in EDITS),
            *(SizeClass("factor", (d_k, d_v), n) for n in EDITS),
            *(SizeClass("downdate_", (d_k,), r) for r in PENDING),
            *(SizeClass(op, (d_v, d_k), n) for op in ("correct_", "correct_split_") for n in EDITS),
            *(SizeClass("moment_", (d_k,), TOKENS, dtype) for dtype in (torch.float32, torch.bfloat16)),
        ]
        found |= dict.fromkeys(size.rounded() for size in every if size.numbers >= SMALLEST)
    return [*found]


def stored() -> list[dict[str, Any]]:
    """Returns the stored choices of the devices of this machine.

    Returns:
        For each device its `device`, the `path` of the file, and `choices` by size class; JSON-serializable. Nothing if
        there is no cache folder.
    """
    try:
        cache_folder()
    except RuntimeError:  # without a home folder
        return []
    found = []
    for device in devices():
        kept = dispatch.choices_of(device)
        every = {key: asdict(choice) for key, choice in sorted(kept.read().items(), key=_order)}
        found.append({"device": f"{device} ({kept.about['device']})", "path": str(kept.path), "choices": every})
    return found


@full_float32()
def tune(device: torch.device, progress: Callable[[int, int], object] = lambda done, total: None) -> dict[str, Choice]:
    """Checks and times the backends of a device, and stores the choices in place of the former ones.

    Args:
        device: the device.
        progress: called with the number of sizes that are done, and their total.

    Returns:
        The choices by size class: common sizes, and those that were stored; none for operations with one backend.

    Raises:
        InputError: the cache folder cannot be written.
    """
    chosen = dispatch.selection_of(device)
    kept = chosen.choices
    if not kept.writable():
        raise InputError(f"{kept.path.parent} cannot be written; set RLSEDIT_CACHE to a writable folder")
    kept.forget_crashes()
    every = [*dict.fromkeys([*sizes(), *map(SizeClass.parse, kept.read())])]
    found = dict[str, Choice]()
    for done, size in enumerate(every):
        progress(done, len(every))
        tensors, _ = problem(replace(size, widths=(64, 64)[: len(size.widths)]), device, pending=1)
        names, default = dispatch.alternatives(size, tensors)
        if len(names) > 1:
            choice = chosen.measure(size, dispatch.runs(size.op, names), default, seconds=SECONDS)
            if choice is not None:
                found[size.key] = choice
    progress(len(every), len(every))
    merged = kept.store(found, replace=True)
    dispatch.forget_selections()
    if merged is None:
        raise InputError(f"{kept.path} cannot be written; set RLSEDIT_CACHE to a writable folder")
    return found


def _order(stored: tuple[str, Choice]) -> tuple[str, str, tuple[int, ...], int]:
    size = SizeClass.parse(stored[0])
    return size.op, str(size.dtype), size.widths, size.rows
