"""Accuracy of a bfloat16 weight under many small updates, with and without exact lower halves.

The same stream of rank-one updates of relative size 1e-4 is added to a weight in four representations: float32, the two
halves of the float32 bits (two extra bytes per entry in addition to the model's bfloat16), float32 rounded to bfloat16
after every step, and bfloat16 added to bfloat16. Errors are relative Frobenius norms against float64 and against the
float32 result.

    python bench/masters.py --json bench/results/masters.json
"""

from __future__ import annotations

import argparse

import torch
from recording import add_json, record
from torch import Tensor

from rlsedit_fast import ops

SEED = 5
RELATIVE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-v", type=int, default=512)
    parser.add_argument("--d-k", type=int, default=1024)
    parser.add_argument("--updates", type=int, default=2000)
    add_json(parser)
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(options.d_v, options.d_k, generator=generator).bfloat16()
    exact, single = start.double(), start.float()
    high, low = ops.split(start.float())
    rounded, plain = start.clone(), start.clone()
    for _ in range(options.updates):
        whitened = torch.randn(1, options.d_v, generator=generator)
        rows = torch.randn(1, options.d_k, generator=generator)
        whitened *= RELATIVE * start.float().norm() / (whitened.norm() * rows.norm())
        exact.addmm_(whitened.double().T, rows.double())
        ops.correct_(single, whitened, rows, 1)
        ops.correct_split_(high, low, whitened, rows, 1)
        rounded = rounded.float().addmm_(whitened.T, rows).bfloat16()
        plain += (whitened.T @ rows).bfloat16()

    moved = float((exact - start.double()).norm() / exact.norm())

    def error(value: Tensor, truth: Tensor) -> float:
        return float((value.double() - truth.double()).norm() / truth.double().norm())

    ways = {
        "float32": single,
        "two halves": ops.join(high, low),
        "float32 rounded to bfloat16 each step": rounded,
        "bfloat16 + bfloat16": plain,
    }
    rows_out = [
        {"kept as": name, "error against float64": error(value, exact), "difference from float32": error(value, single)}
        for name, value in ways.items()
    ]
    print(f"{options.updates} updates of relative size {RELATIVE:g}; the weight moved by {moved:.3g} of its norm")
    for row in rows_out:
        print(f"{row['kept as']:40}{row['error against float64']:12.2e}{row['difference from float32']:12.2e}")
    about = {"d_v": options.d_v, "d_k": options.d_k, "updates": options.updates, "relative size": RELATIVE}
    what = "a bfloat16 weight under many small updates, kept in four ways"
    record(options.json, what, **about, seed=SEED, moved=moved, rows=rows_out)


if __name__ == "__main__":
    main()
