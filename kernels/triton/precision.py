"""Precisions of float32 products on the tensor cores, and those that are too low for a precision inverse.

Measured by `bench/precision.py`: over hundreds of updates tf32x3 and bf16x6 are as accurate as float32, while tf32
loses positive definiteness.

On sm_90 tensor cores read a tf32 right operand from shared memory with contiguous summands. Where rows are the
summands, the compiler therefore transposes it with stores of single words and 16-way bank conflicts. A bf16 operand may
have either order, so `downdate`, `correct` and `moment` use bf16x6 there; see docs/kernels.md. tf32x3 and bf16x6 take
the same time in the tensor cores.
"""

from __future__ import annotations

import os

from rlsedit_fast.errors import InputError

ENVIRONMENT = "RLSEDIT_TRITON_PRECISION"
DEFAULT = "tf32x3"
DEFAULTS = {(kernel, "sm_90"): "bf16x6" for kernel in ("downdate", "correct", "moment")}
"""Defaults by table and compute capability, where they are not `DEFAULT`."""

PRECISIONS = {
    "tf32x3": "three tf32 products of operands split in two parts: relative error of a product below 2^-20",
    "bf16x6": "six bf16 products of operands split in three parts: below 2^-22",
    "ieee": "float32 products without the tensor cores: below 2^-24",
}

REJECTED = {
    "tf32": "with 11-bit operands C loses positive definiteness within a few hundred updates",
    "bf16x3": "it omits 2^-16 of a product, and the error of C is more than ten times that of float32",
    "bf16": "with 8-bit operands C loses positive definiteness, and a factorization fails soon",
}


def default(kernel: str, capability: str) -> str:
    """Returns the default precision of a kernel on a device."""
    return DEFAULTS.get((kernel, capability), DEFAULT)


def chosen(precision: str | None, kernel: str = "", capability: str = "") -> str:
    """Returns the precision: the argument, else `RLSEDIT_TRITON_PRECISION`, else the default.

    Args:
        precision: a key of `PRECISIONS`, or None.
        kernel: name of the kernel's table, for the default.
        capability: compute capability as in the tables, for the default.

    Raises:
        InputError: the precision is unknown or too low.
    """
    source = "input_precision" if precision is not None else ENVIRONMENT
    name = precision if precision is not None else os.environ.get(ENVIRONMENT) or default(kernel, capability)
    if name in PRECISIONS:
        return name
    expected = f"expected one of {', '.join(PRECISIONS)}"
    if name in REJECTED:
        raise InputError(f"{source}={name!r} is not supported: {REJECTED[name]}; {expected}")
    raise InputError(f"{source}={name!r}: {expected}")
