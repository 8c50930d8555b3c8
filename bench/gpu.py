"""Times every operation on a CUDA device, on each backend that runs it; `reference` is torch's own kernels.

CUDA events round a row of calls, the backends in turn, medians of the rows; the memory touched is larger than the
last cache for the default widths.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from rlsedit_fast import ops
from rlsedit_fast.doctor import context
from rlsedit_fast.ops import dispatch

CALLS = 10  # in a row between two events


def operands(op: str, d: int, n: int) -> tuple[object, ...]:
    """Arguments of d_k = d, d_v = 4096 and n edits (or pending rows) that bear being used again and again."""
    base = torch.eye(d, device="cuda") + 1e-3
    keys, innovation = (torch.randn(n, width, device="cuda") for width in (d, 4096))
    pending, signs, noise = 1e-4 * keys, torch.ones(n, device="cuda"), torch.ones(n, device="cuda")
    return {
        "panel": lambda: (base, keys, pending[:0], signs[:0]),
        "factor": lambda: (keys @ base, keys, innovation, noise, 1),
        "downdate_": lambda: (base, pending, signs),
    }[op]()


def milliseconds(run: Callable[[], object]) -> float:
    """The time of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / CALLS


def measure(op: str, d: int, n: int, repeats: int) -> dict[str, object]:
    """Median milliseconds by backend."""
    given = operands(op, d, n)
    tensors = [operand for operand in given if isinstance(operand, torch.Tensor)]
    backends = [name for name in dispatch.BACKENDS if dispatch.why_not(name, op, tensors) is None]
    times: dict[str, list[float]] = {name: [] for name in backends}
    for repeat in range(repeats + 2):
        for name in backends:
            time = milliseconds(lambda name=name: getattr(ops, op)(*given, backend=name))
            if repeat >= 2:  # the first rows compile and warm up
                times[name].append(time)
    return {"op": op, "d": d, "n": n, "ms": {name: round(statistics.median(row), 4) for name, row in times.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=[4096, 14336])
    parser.add_argument("--n", type=int, nargs="+", default=[1, 16, 64, 100])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "torch sees no CUDA device\n")
    print(f"{'op':<10} {'d':>6} {'n':>4}  milliseconds")
    results = []
    for op in ("panel", "factor", "downdate_"):
        for d in options.d:
            for n in options.n:
                row = measure(op, d, n, options.repeats)
                results.append(row)
                print(f"{op:<10} {d:6} {n:4}  " + "  ".join(f"{k} {v:.3f}" for k, v in row["ms"].items()), flush=True)
    if options.json:
        record = {"what": "operations on a GPU", "repeats": options.repeats, **context(), "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
