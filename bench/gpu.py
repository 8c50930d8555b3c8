"""Times every operation on a CUDA device, on each available backend; `reference` uses torch's own kernels.

CUDA events measure groups of calls, alternating between backends; results are medians. Cases whose operands fit twice
into the last-level cache are marked `cached`, since they do not measure memory bandwidth. The floor is the time to move
the bytes of the operation once at the rate of a large copy on this device; it is reported as a fraction of the measured
time. Many cases are compute-bound instead (n of at least 32 or 64, and `moment_`), and single small layers are bound by
launch overhead, which a CUDA graph avoids.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable

import torch
from recording import add_json, record

from rlsedit_fast import ops
from rlsedit_fast.ops import dispatch

CALLS = 10  # maximum number of calls between two events
LONG = 100.0  # approximate maximum milliseconds of such a group
D_V = 4096
TOKENS = 4096  # rows of `moment_`
TRIANGLE_PANELS = ("cuda", "cuda graph", "triton triangle")  # variants whose panel reads one triangle of C
COPIED = 1 << 30  # bytes of the copy that measures bandwidth


def operands(op: str, d: int, n: int, layers: int) -> tuple[object, ...]:
    """Returns arguments with d_k = d, d_v = `D_V` and n edits (or pending rows) that can be reused."""
    base = (torch.eye(d, device="cuda") + 1e-3).repeat(layers, 1, 1)
    keys, innovation = (torch.randn(layers, n, width, device="cuda") for width in (d, D_V))
    pending, signs = 1e-4 * keys, torch.ones(layers, n, device="cuda")

    def weight() -> torch.Tensor:
        return torch.randn(layers, D_V, d, device="cuda")

    return {
        "panel": lambda: (base, keys, pending[:, :0], signs[:, :0]),
        "factor": lambda: (keys @ base, keys, innovation, signs, 1),
        "downdate_": lambda: (base, pending, signs),
        "correct_": lambda: (weight(), 1e-4 * innovation, keys, 1),
        "correct_split_": lambda: (*ops.split(weight()), 1e-4 * innovation, keys, 1),
        "moment_": lambda: (base, 1e-4 * torch.randn(layers, TOKENS, d, device="cuda", dtype=torch.bfloat16)),
    }[op]()


def least_bytes(op: str, variant: str, d: int, n: int, layers: int) -> int:
    """Returns the minimum bytes that a variant moves: operands read once, results written once.

    Of a symmetric C or M half is read, except by the panels that read all of C.
    """
    whole = variant not in TRIANGLE_PANELS
    return (
        layers
        * {
            "panel": (4 if whole else 2) * d * d + 8 * n * d,
            "factor": 4 * n * (3 * d + 2 * D_V),
            "downdate_": 6 * d * d + 4 * n * d,
            "correct_": 8 * D_V * d + 4 * n * (D_V + d),
            "correct_split_": 8 * D_V * d + 4 * n * (D_V + d),
            "moment_": 6 * d * d + 2 * TOKENS * d,
        }[op]
    )


def copy_rate() -> float:
    """Returns the best rate of a large copy in bytes (read and written) per millisecond."""
    source = torch.randn(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / min(milliseconds(lambda: target.copy_(source)) for _ in range(5))


def in_a_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Captures the call, which must have been compiled before, in a CUDA graph and returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def runs(op: str, given: tuple[object, ...]) -> dict[str, Callable[[], object]]:
    """Returns callables by name: each available backend, and variants of those with kernels of this package."""
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    backends = [name for name in dispatch.BACKENDS if dispatch.unsupported_reason(name, op, tensors) is None]
    variants = {name: lambda name=name: getattr(ops, op)(*given, backend=name) for name in backends}
    for name in [name for name in ("cuda", "triton") if name in variants]:
        variants[name]()
        variants[f"{name} graph"] = in_a_graph(variants[name])
    if op == "panel" and "triton" in variants:
        from rlsedit_fast.kernels import panel

        if tensors[1].shape[1] <= panel.TRIANGLE_MAX_ROWS:
            variants["triton triangle"] = lambda: panel.panel(*tensors, variant="triangle")
    return variants


def milliseconds(run: Callable[[], object], calls: int = CALLS) -> float:
    """Returns the time per call in milliseconds."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def measure(op: str, d: int, n: int, layers: int, repeats: int, rate: float) -> dict[str, object]:
    """Returns median milliseconds by backend, minimum bytes, and the fraction of the floor at `rate` bytes/ms."""
    variants = runs(op, operands(op, d, n, layers))
    times: dict[str, list[float]] = {name: [] for name in variants}
    calls: dict[str, int] = {}
    for name, run in variants.items():
        milliseconds(run, 1)  # compiles
        calls[name] = max(1, min(CALLS, int(LONG / milliseconds(run, 1))))
    for _ in range(repeats):
        for name, run in variants.items():
            times[name].append(milliseconds(run, calls[name]))
    medians = {name: statistics.median(row) for name, row in times.items()}
    least = {name: least_bytes(op, name, d, n, layers) for name in variants}
    return {
        **{"op": op, "d": d, "n": TOKENS if op == "moment_" else n, "layers": layers},
        "ms": {name: round(time, 4) for name, time in medians.items()},
        "least_bytes": least,
        "cached": min(least.values()) < 2 * torch.cuda.get_device_properties(0).L2_cache_size,
        "share_of_floor": {name: round(least[name] / rate / time, 3) for name, time in medians.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d", type=int, nargs="+", default=[4096, 14336])
    parser.add_argument("--n", type=int, nargs="+", default=[1, 16, 64, 100])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--repeats", type=int, default=15)
    add_json(parser)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "no CUDA device is available to torch\n")
    rate = copy_rate()
    print(f"copy bandwidth: {rate / 1e9:.2f} TB/s")
    print(f"{'op':<14} {'d':>6} {'n':>4} {'layers':>6}  milliseconds (fraction of the floor)")
    results = []
    for op, d, layers in itertools.product(dispatch.OPERATIONS, options.d, options.layers):
        for n in options.n if op != "moment_" else [TOKENS]:
            row = measure(op, d, n, layers, options.repeats, rate)
            results.append(row)
            found = "  ".join(f"{k} {v:.3f} ({row['share_of_floor'][k]:.0%})" for k, v in row["ms"].items())
            print(f"{op:<14} {d:6} {n:4} {layers:6}  {found}{'  (cached)' if row['cached'] else ''}", flush=True)
            about = {"repeats": options.repeats, "copy_bytes_per_ms": round(rate)}
            record(options.json, "operations on a GPU", **about, results=results)


if __name__ == "__main__":
    main()
