"""How a float32 product is computed on the tensor cores, and which ways are too coarse for a precision inverse.

`bench/precision.py` measures the policy: over hundreds of updates tf32x3 and bf16x6 are as good as float32, tf32
loses positive definiteness.
"""

from __future__ import annotations

import os

from rlsedit_fast.errors import InputError

ENVIRONMENT = "RLSEDIT_TRITON_PRECISION"
DEFAULT = "tf32x3"

PRECISIONS = {
    "tf32x3": "three tf32 products of operands in two parts: relative error of a product below 2^-20",
    "bf16x6": "six bf16 products of operands in three parts: below 2^-22",
    "ieee": "float32 products on the ordinary cores: below 2^-24, without the tensor cores",
}

REFUSED = {
    "tf32": "operands of 11 bits cost C its positive definiteness within some hundred updates",
    "bf16x3": "it leaves out 2^-16 of a product, and C is off by more than ten times what it is in float32",
    "bf16": "operands of 8 bits cost C its positive definiteness, and soon a factorisation fails",
}


def chosen(precision: str | None) -> str:
    """The precision that the caller, else the environment's `RLSEDIT_TRITON_PRECISION`, else the default names.

    Raises:
        InputError: there is none of that name, or it is too coarse; the text says why.
    """
    source = "input_precision" if precision is not None else ENVIRONMENT
    name = precision if precision is not None else os.environ.get(ENVIRONMENT) or DEFAULT
    if name in PRECISIONS:
        return name
    expected = f"expected one of {', '.join(PRECISIONS)}"
    if name in REFUSED:
        raise InputError(f"{source}={name!r} is refused: {REFUSED[name]}; {expected}")
    raise InputError(f"{source}={name!r}: {expected}")
