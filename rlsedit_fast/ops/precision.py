"""Float32 products in float32, whatever a program has allowed for its model's sake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
_BY_BACKEND = all(hasattr(matmul, "fp32_precision") for matmul in _MATMULS)  # from torch 2.9 on
_FULL = ("none", "ieee")


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it no float32 matrix product is rounded to tf32 or bfloat16 (`torch.set_float32_matmul_precision`).

    Under tf32 the solver's C loses positive definiteness (bench/results/precision.json); a user's setting, which is for
    the model, is put back behind it.
    """
    if not _BY_BACKEND:
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    narrowed = [(matmul, matmul.fp32_precision) for matmul in _MATMULS if matmul.fp32_precision not in _FULL]
    for matmul, _ in narrowed:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        for matmul, allowed in narrowed:
            matmul.fp32_precision = "none"  # as what is set for all of torch says
            if matmul.fp32_precision != allowed:
                matmul.fp32_precision = allowed
