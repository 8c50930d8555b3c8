"""Kernel configurations, one JSON file per kernel. There is no tuning at run time, which would need a driver.

A file has an entry per compute capability (such as `sm_90`) and a `default` entry. An entry is a list of configurations
in ascending order of `rows`, the maximum number of rows of the small operand. The first configuration with enough rows
is used, else the last. Settings under the name of a precision override the others for that precision.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlsedit_fast.kernels.precision import PRECISIONS

DEFAULT = "default"
INTERPRETED_PROCESSORS = 4  # for Triton's interpreter, so that small matrices are split as well


@cache
def table(kernel: str) -> dict[str, list[dict[str, Any]]]:
    """Returns the configuration file of a kernel."""
    entries: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name(f"{kernel}.json").read_text())
    return entries


@cache
def configuration(kernel: str, capability: str, rows: int, precision: str) -> dict[str, Any]:
    """Returns the settings of a launch without `rows`, read-only."""
    entries = table(kernel).get(capability) or table(kernel)[DEFAULT]
    entry = next((entry for entry in entries if entry["rows"] >= rows), entries[-1])
    settings = {name: value for name, value in entry.items() if name not in ("rows", *PRECISIONS)}
    # Fused multiply-adds are requested explicitly, because the default of Triton is about to change.
    return settings | {"enable_fp_fusion": True} | entry.get(precision, {})


def interpreted() -> bool:
    """Returns whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def device(index: int | None) -> tuple[str, int]:
    """Returns the capability name in the tables and the number of multiprocessors; None is the interpreter's CPU."""
    if index is None:
        return DEFAULT, INTERPRETED_PROCESSORS
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}", torch.cuda.get_device_properties(index).multi_processor_count
