"""Keeps float32 matrix products in full float32 precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MATMULS: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
_BY_BACKEND = all(hasattr(matmul, "fp32_precision") for matmul in _MATMULS)  # torch >= 2.9
_FULL = ("none", "ieee")


@contextmanager
def full_float32() -> Iterator[None]:
    """Disables tf32 and bfloat16 in float32 matrix products (`torch.set_float32_matmul_precision`) inside the block.

    With tf32 the solver's C loses positive definiteness (bench/results/precision.json). The user's setting is restored
    on exit.
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
            matmul.fp32_precision = "none"  # inherits the global setting
            if matmul.fp32_precision != allowed:
                matmul.fp32_precision = allowed
