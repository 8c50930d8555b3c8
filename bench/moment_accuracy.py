"""Accuracy of key statistics that are summed in float32 over a stream of tokens, against float64.

The keys resemble those of an MLP: outputs of a nonlinearity with nonzero mean, features of very different magnitude,
and one token per pass that is 100 times larger. Three ways are compared: in-place float32 sums (as in `KeyStatistics`),
float32 sums per pass added to a float32 total, and to a float64 total. Errors are relative to `sqrt(M_ii M_jj)` (root
mean square) and to the largest eigenvalue.

    python bench/moment_accuracy.py --json bench/results/moment-accuracy.json
"""

from __future__ import annotations

import argparse

import torch
from recording import add_json, record

PASS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=192)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    add_json(parser)
    options = parser.parse_args()

    d, generator = options.d, torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, d)
    mix = torch.randn(d, d, generator=generator) / d**0.5
    exact, wide = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    in_place, totals = torch.zeros(d, d), torch.zeros(d, d)
    passes = -(-options.tokens // PASS)
    for _ in range(passes):
        keys = torch.nn.functional.silu(torch.randn(PASS, d, generator=generator) @ mix + 0.3) * scale
        keys[0] *= 100
        exact.addmm_(keys.double().T, keys.double())
        in_place.addmm_(keys.T, keys)
        once = keys.T @ keys
        totals += once
        wide += once.double()
    size = exact.diagonal().sqrt()
    spectrum = torch.linalg.eigvalsh(exact)
    rows = []
    for name, found in (("float32 in place", in_place), ("float32 total", totals), ("float64 total", wide)):
        error = found.double() - exact
        relative = float((error / (size[:, None] * size)).square().mean().sqrt())
        rows.append(
            {
                "sums": name,
                "rms error": relative,
                "of the largest eigenvalue": float(torch.linalg.eigvalsh(error).abs().max() / spectrum[-1]),
            }
        )
        print(f"{name:20}{relative:12.1e}{rows[-1]['of the largest eigenvalue']:12.1e}")
    about = {"d": d, "tokens": passes * PASS, "condition": float(spectrum[-1] / spectrum[0])}
    record(options.json, "accuracy of key statistics summed in float32", **about, rows=rows)


if __name__ == "__main__":
    main()
