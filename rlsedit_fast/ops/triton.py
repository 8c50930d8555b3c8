"""The `triton` backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

OPS: dict[str, Callable[..., Any]] = {}


def missing() -> str | None:
    """Why it cannot run on this machine, or None."""
    return None if torch.cuda.is_available() else "there is no CUDA device (torch.cuda.is_available() is false)"


def refuses(op: str, tensors: Sequence[Tensor]) -> str | None:
    """Why it cannot take these tensors."""
    return None
