"""The shipped configurations: a JSON file per kernel, read once. No tuning at run time, which would need a driver.

A file has an entry per compute capability (`sm_90`) and one called `default` for every other. An entry is a list of
configurations in ascending `rows`, the number of rows of the small operand that one is good for: the first that holds
the rows asked for is taken, else the last. A configuration may have keys named as a precision, whose settings
replace its own in that precision.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlsedit_fast.kernels.precision import PRECISIONS

DEFAULT = "default"
INTERPRETED_PROCESSORS = 4  # what the interpreter is told, so that small matrices are split as well


@cache
def table(kernel: str) -> dict[str, list[dict[str, Any]]]:
    """The whole file of a kernel."""
    entries: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name(f"{kernel}.json").read_text())
    return entries


@cache
def configuration(kernel: str, capability: str, rows: int, precision: str) -> dict[str, Any]:
    """The settings for a launch, `rows` left out; not to be written to."""
    entries = table(kernel).get(capability) or table(kernel)[DEFAULT]
    entry = next((entry for entry in entries if entry["rows"] >= rows), entries[-1])
    settings = {name: value for name, value in entry.items() if name not in ("rows", *PRECISIONS)}
    # Fused multiply-adds are asked for by name, since Triton is about to change what it does unasked.
    return settings | {"enable_fp_fusion": True} | entry.get(precision, {})


@cache
def device(index: int | None) -> tuple[str, int]:
    """The capability's name in the tables and the number of multiprocessors; index None is the interpreter's CPU."""
    if index is None:
        return DEFAULT, INTERPRETED_PROCESSORS
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}", torch.cuda.get_device_properties(index).multi_processor_count
