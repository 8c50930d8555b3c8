"""Times native in-place operations against torch on the CPU.

`downdate_` (flush of pending rows into C) and `moment_` (sum of key statistics): BLAS SSYRK and a native mirror pass
against a torch matrix product. `correct_split_` (update of a bfloat16 weight with exact lower halves, d/4 by d): the
native kernel against several torch passes, and against `addmm_` of a float32 weight.

    python bench/native.py downdate_ --rows 128 256 512 1024 --d 1024 2048 3072 4096 8192 \
        --json bench/results/downdate-cpu.json
    python bench/native.py moment_ --rows 64 256 1024 4096 --d 1536 4096 --json bench/results/moment-cpu.json
    python bench/native.py correct_split_ --d 8192 --rows 1 16 100 --json bench/results/correct-split-cpu.json

The variants alternate and use separate matrices; results are medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from recording import add_json, record
from side_by_side import medians
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.ops import cpu, reference


def contenders(op: str, rows: Tensor) -> dict[str, Callable[[], None]]:
    """Returns the variants of an operation, each with its own matrix."""
    d = rows.shape[1]
    if op == "correct_split_":
        weight, whitened = torch.randn(d // 4, d), torch.randn(len(rows), d // 4)
        ours, theirs = ops.split(weight), ops.split(weight)
        return {
            "native": lambda: cpu.correct_split_(*ours, whitened, rows, 1),
            "torch": lambda: reference.correct_split_(*theirs, whitened, rows, 1),
            "float32": lambda: reference.correct_(weight, whitened, rows, 1),
        }
    native, other, signs = torch.eye(d), torch.eye(d), torch.ones(len(rows))
    if op == "moment_":
        return {
            "native": lambda: cpu.syrk_moment_(native, rows),
            "torch": lambda: reference.moment_(other, rows),
        }
    return {
        "native": lambda: cpu.syrk_downdate_(native, rows, signs),
        "torch": lambda: reference.downdate_(other, rows, signs),
    }


def measure(op: str, d: int, count: int, repeats: int) -> dict[str, float]:
    """Returns median milliseconds of each variant, and the ratio of torch to native."""
    rows = 1e-4 * torch.randn(count, d, generator=torch.Generator().manual_seed(0))
    times = medians(contenders(op, rows), repeats)
    row = {"d": d, "rows": count} | {f"{name}_ms": round(time, 3) for name, time in times.items()}
    return row | {"ratio": round(times["torch"] / times["native"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=("downdate_", "moment_", "correct_split_"))
    parser.add_argument("--d", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=9)
    add_json(parser)
    options = parser.parse_args()
    if cpu.unavailable_reason():
        parser.exit(1, f"the native kernels are not available: {cpu.unavailable_reason()}\n")
    rows = []
    for d in options.d:
        for count in options.rows:
            rows.append(measure(options.op, d, count, options.repeats))
            print("  ".join(f"{name} {value:g}" for name, value in rows[-1].items()), flush=True)
    record(options.json, f"{options.op} on the CPU", repeats=options.repeats, results=rows)


if __name__ == "__main__":
    main()
