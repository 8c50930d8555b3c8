"""Times `moment_`, the sum behind key statistics, on the CPU: BLAS's SSYRK with the native mirror pass, and torch.

    python bench/moment.py --json bench/results/moment-cpu.json

Both are timed in turn on matrices of their own; the figures are medians.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from side_by_side import medians

from rlsedit_fast.doctor import context
from rlsedit_fast.ops import cpu, reference


def measure(d: int, tokens: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of both, and how many times torch's time is the other's."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.eye(d), torch.eye(d)
    rows = 1e-4 * torch.randn(tokens, d, generator=generator)
    times = medians(
        {
            "syrk": lambda: cpu.syrk_moment_(ours, rows),
            "torch": lambda: reference.moment_(theirs, rows),
        },
        repeats,
    )
    syrk, product = times["syrk"], times["torch"]
    row = {"d": d, "tokens": tokens, "syrk_ms": round(syrk, 3), "torch_ms": round(product, 3)}
    return row | {"ratio": round(product / syrk, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, nargs="+", default=[1536, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    options = parser.parse_args()
    if cpu.missing():
        parser.exit(1, f"the native kernel cannot run: {cpu.missing()}\n")
    rows = []
    for d in options.d:
        for tokens in options.tokens:
            rows.append(measure(d, tokens, options.repeats))
            print("  ".join(f"{name} {value:g}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        record = {"what": "moment_ on the CPU", "repeats": options.repeats, **context(), "results": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
