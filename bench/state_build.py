"""Times in-place blocked factorization and inversion of a state against the two library calls.

Each run starts from its own float64 precision matrix and gives C in float32; the methods alternate and results are
medians. On CUDA, peak memory in addition to the precision matrix is also measured, including C.

    python bench/state_build.py --json bench/results/state-build.json
    python bench/state_build.py --device cuda --d 14336 28672 --json FILE
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from recording import add_json, record
from torch import Tensor

from rlsedit_fast.rls.build import _factor_, _inverse_

CONDITION = 1e4


def library(precision: Tensor) -> Tensor:
    """The torch functions."""
    return torch.cholesky_inverse(torch.linalg.cholesky(precision)).float().contiguous()


def blocks(precision: Tensor) -> Tensor:
    """The blocked functions that build a state; overwrites the precision."""
    return _inverse_(_factor_(precision, 1.0, 0.0, "layer"), torch.float32)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {"library": library, "blocks": blocks}


def measure(d: int, device: str, rounds: int) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    scale = torch.logspace(0, -2, d, dtype=torch.float64, device=device)
    rows = torch.randn(d + 64, d, dtype=torch.float64, device=device, generator=generator) * scale
    precision = (rows.T @ rows).div_(d)
    del rows
    precision.diagonal().add_(1 / CONDITION)
    cuda = precision.device.type == "cuda"
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    row: dict[str, Any] = {"d": d}
    for _ in range(rounds + 1):
        for way, run in WAYS.items():
            own = precision.clone()
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            inverse = run(own)
            if cuda:
                torch.cuda.synchronize()
                row[f"{way} bytes"] = torch.cuda.max_memory_allocated() - before
            times[way].append(time.perf_counter() - began)
            probe = torch.ones(d, 1, dtype=torch.float64, device=device)
            back = torch.cat([part.double() @ (precision @ probe) for part in inverse.split(512)])
            row[f"{way} residual"] = float((back - probe).norm() / probe.norm())
            del inverse, own
    for way, found in times.items():
        row[f"{way} seconds"] = statistics.median(found[1:])  # the first run touches memory
    row["ratio"] = row["library seconds"] / row["blocks seconds"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="such as cuda")
    add_json(parser)
    options = parser.parse_args()
    rows = []
    for d in options.d:
        rows.append(measure(d, options.device, options.rounds))
        print("  ".join(f"{name}: {value:.4g}" for name, value in rows[-1].items()), flush=True)
    record(options.json, "a state's factor and inverse, by blocks and by the library", device=options.device, rows=rows)


if __name__ == "__main__":
    main()
