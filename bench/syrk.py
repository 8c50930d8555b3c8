"""Times BLAS's SSYRK with the native mirror pass against torch's product, on the CPU.

`downdate_` is the flush of pending rows into C, `moment_` the sum behind key statistics.

    python bench/syrk.py downdate_ --json bench/results/downdate-cpu.json
    python bench/syrk.py moment_ --rows 64 256 1024 4096 --d 1536 4096 --json bench/results/moment-cpu.json

Both are timed in turn on matrices of their own; the figures are medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import medians
from torch import Tensor

from rlsedit_fast.doctor import context
from rlsedit_fast.ops import cpu, reference


def contenders(op: str, rows: Tensor) -> dict[str, Callable[[Tensor], None]]:
    """The two ways of an operation, each on a matrix."""
    if op == "moment_":
        return {"syrk": lambda m: cpu.syrk_moment_(m, rows), "torch": lambda m: reference.moment_(m, rows)}
    signs = torch.ones(len(rows))
    return {
        "syrk": lambda m: cpu.syrk_downdate_(m, rows, signs),
        "torch": lambda m: reference.downdate_(m, rows, signs),
    }


def measure(op: str, d: int, count: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of both, and how many times SSYRK's time torch's is."""
    rows = 1e-4 * torch.randn(count, d, generator=torch.Generator().manual_seed(0))
    matrices = {name: torch.eye(d) for name in ("syrk", "torch")}
    ways = contenders(op, rows)
    times = medians({name: lambda name=name: ways[name](matrices[name]) for name in ways}, repeats)
    row = {"d": d, "rows": count} | {f"{name}_ms": round(time, 3) for name, time in times.items()}
    return row | {"ratio": round(times["torch"] / times["syrk"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=("downdate_", "moment_"))
    parser.add_argument("--d", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    options = parser.parse_args()
    if cpu.missing():
        parser.exit(1, f"the native kernel cannot run: {cpu.missing()}\n")
    rows = []
    for d in options.d:
        for count in options.rows:
            rows.append(measure(options.op, d, count, options.repeats))
            print("  ".join(f"{name} {value:g}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        record = {"what": f"{options.op} on the CPU", "repeats": options.repeats, **context(), "results": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
