"""Times `panel` on the CPU: the native kernel against `K @ C` in torch.

Both alternate, so that other load affects both equally; results are medians. C is not cached: a buffer larger than the
last-level cache is written between calls.
"""

from __future__ import annotations

import argparse

import torch
from recording import add_json, record
from side_by_side import medians

from rlsedit_fast.ops import cpu, reference


def measure(d: int, n: int, repeats: int) -> dict[str, float]:
    """Returns median milliseconds of both, and the ratio of torch to native."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(d, d, generator=generator)
    keys = torch.randn(n, d, generator=generator)
    pending, signs = keys[:0], keys[:0, 0]
    contenders = {
        "native": lambda: cpu.native_panel(base, keys),
        "torch": lambda: reference.panel(base, keys, pending, signs),
    }
    times = medians(contenders, repeats)
    native, torch_ms = times["native"], times["torch"]
    return {
        "d": d,
        "n": n,
        "native_ms": round(native, 3),
        "torch_ms": round(torch_ms, 3),
        "ratio": round(torch_ms / native, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 16, 32, 64, 100])
    parser.add_argument("--repeats", type=int, default=15)
    add_json(parser)
    options = parser.parse_args()
    if cpu.unavailable_reason():
        parser.exit(1, f"the native kernels are not available: {cpu.unavailable_reason()}\n")
    print(f"{'d':>6} {'n':>4} {'native ms':>10} {'torch ms':>10} {'torch/native':>13}")
    results = []
    for d in options.d:
        for n in options.n:
            row = measure(d, n, options.repeats)
            results.append(row)
            print("{d:6} {n:4} {native_ms:10.2f} {torch_ms:10.2f} {ratio:13.2f}".format(**row), flush=True)
    record(options.json, "panel on the CPU", repeats=options.repeats, results=results)


if __name__ == "__main__":
    main()
