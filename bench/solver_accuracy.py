"""Accuracy of the solver over a stream of updates and removals, against the normal equations in float64.

For every condition number of the prior precision, with immediate or deferred updates of C: relative errors of W and C
in the Frobenius norm after the updates, after the removals and after a refresh, and the residual of the monitor. Keys
are random directions of norm 1; the spectrum of S0 is geometric around 1.

    python bench/solver_accuracy.py --delays 0 128 --json bench/results/solver-accuracy.json
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from recording import add_json, record
from torch import Tensor

from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.reference import solve_all
from rlsedit_fast.rls.state import DEFAULT_DELAY

SEED = 7


def spectrum_moment(d_k: int, condition: float, generator: torch.Generator) -> Tensor:
    """Returns a moment with geometric eigenvalues from `condition ** -0.5` to `condition ** 0.5`."""
    basis, _ = torch.linalg.qr(torch.randn(d_k, d_k, dtype=torch.float64, generator=generator))
    root = basis * torch.logspace(-0.25, 0.25, d_k, base=condition, dtype=torch.float64)
    return root @ root.T


def measure(state: RLSState, original: Tensor, prior: Prior, keys: Tensor, values: Tensor) -> dict[str, float]:
    """Returns relative errors of W and C for these edits, and the residual of the monitor."""
    weight, inverse, objective = solve_all(original, prior, keys, values)
    return {
        "weight": float((state.weight.double() - weight).norm() / weight.norm()),
        "precision_inverse": float((state.precision_inverse().double() - inverse).norm() / inverse.norm()),
        "objective": abs(state.objective - objective) / max(objective, torch.finfo(torch.float64).tiny),
        "monitor_residual": state.monitor().residual,
    }


def stream(options: argparse.Namespace, condition: float, delay: int, dtype: torch.dtype) -> dict[str, Any]:
    """Runs one stream: updates in batches, removal of every k-th batch, a refresh."""
    generator = torch.Generator().manual_seed(SEED)
    moment = spectrum_moment(options.d_k, condition, generator)
    prior = Prior(lam=0.0, mu=1.0, anchor_moment=moment)
    original = torch.randn(options.d_v, options.d_k, generator=generator)
    rows = options.updates * options.batch
    keys = torch.nn.functional.normalize(torch.randn(rows, options.d_k, generator=generator), dim=1)
    values = torch.randn(rows, options.d_v, generator=generator)
    every = options.updates // options.removals
    removed = torch.arange(options.updates) % every == every - 1
    removed &= removed.cumsum(0) <= options.removals

    state = RLSState(original, prior, delay=delay, dtype=dtype)
    for k, v in zip(keys.split(options.batch), values.split(options.batch), strict=True):
        state.update(k, v)
    result: dict[str, Any] = {"condition": condition, "delay": delay, "dtype": str(dtype).removeprefix("torch.")}
    result["after_updates"] = measure(state, original, prior, keys, values)
    for index in removed.nonzero()[:, 0].tolist():
        batch = slice(index * options.batch, (index + 1) * options.batch)
        state.remove(keys[batch], values[batch])
    left = ~removed.repeat_interleave(options.batch)
    result["after_removals"] = measure(state, original, prior, keys[left], values[left])
    state.refresh(keys[left], values[left])
    result["after_refresh"] = measure(state, original, prior, keys[left], values[left])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-k", type=int, default=1024)
    parser.add_argument("--d-v", type=int, default=256)
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument(
        "--removals", type=int, default=200, help="number of removals, of every k-th update (at least 1)"
    )
    parser.add_argument("--batch", type=int, default=2, help="rows per update")
    parser.add_argument("--conditions", type=float, nargs="+", default=[1e2, 1e4, 1e6])
    parser.add_argument("--delays", type=int, nargs="+", default=[0, DEFAULT_DELAY])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "float64"], default=["float32", "float64"])
    add_json(parser)
    options = parser.parse_args()

    results = []
    for dtype in options.dtypes:
        for condition in options.conditions:
            for delay in options.delays:
                result = stream(options, condition, delay, getattr(torch, dtype))
                results.append(result)
                print(f"{dtype}  condition {condition:.0e}  delay {delay}")
                for stage in ("after_updates", "after_removals", "after_refresh"):
                    print(f"  {stage:15}" + "  ".join(f"{name} {value:.1e}" for name, value in result[stage].items()))
    sizes = {name: getattr(options, name) for name in ("d_k", "d_v", "updates", "removals", "batch")}
    record(options.json, "accuracy of the solver", sizes=sizes, seed=SEED, results=results)


if __name__ == "__main__":
    main()
