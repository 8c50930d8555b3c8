"""Effect of the weight of the bare prompt's row on the bare prompts, the other contexts and the anchors.

    python bench/row_weights.py --store STORE --json bench/results/real/row-weights-smollm2.json

STORE is the store of a stream with a row per context (`bench/real_stream.py --work` keeps one). Its keys and its prior
are used; the values are drawn at random, the same for all contexts of an edit. For several weights of the bare
prompt's row and several numbers of edits, the least-squares problem of one layer is solved in float64. Printed are the
realized share of the requested change at the bare prompts and in the other contexts, and the change on the anchors
relative to the requested changes, `||K0 dW^T||_F / ||R||_F`. `mean` and `bare` are one row per edit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from recording import add_json, record
from torch import Tensor

from rlsedit_fast.store import Store

WIDTH = 64  # of the random values


def read(directory: Path, layer: int) -> tuple[Tensor, Tensor, float, float]:
    """Returns the keys `[edits, contexts, d_k]` of one layer in a store, the anchor moment, lam and mu of its prior."""
    with Store(directory, write=False) as store:
        start, *rest = store.entries
        prior, moment = start.about["priors"][layer], store.tensors(start)[f"moment.{layer}"].double()
        keys = []
        for entry in rest:
            if entry.kind == "edit" and len(set(entry.about["rows"])) == 1:
                keys.append(store.tensors(entry)[f"keys.{layer}"].unflatten(0, (-1, entry.about["rows"][0])))
    return torch.cat(keys).double(), moment, prior["lam"], prior["mu"]


def solve(rows: Tensor, weights: Tensor, residual: Tensor, precision: Tensor) -> Tensor:
    """Returns `dW^T [d_k, width]`, which minimizes `sum w ||k dW^T - r||^2 + tr(dW S dW^T)`.

    Args:
        rows: `[n, d_k]`.
        weights: `[n]`.
        residual: `[n, width]`.
        precision: S, `[d_k, d_k]`.
    """
    return torch.linalg.solve(precision + rows.T @ (weights[:, None] * rows), rows.T @ (weights[:, None] * residual))


def shares(change: Tensor, keys: Tensor, residual: Tensor) -> list[float]:
    """Returns the mean over edits of the realized share, per context."""
    return [
        float((1 - (residual - keys[:, context] @ change).norm(dim=1) / residual.norm(dim=1)).mean())
        for context in range(keys.shape[1])
    ]


def main() -> None:
    """Computes, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--layer", type=int, default=-1, help="place among the edited layers; default: the last")
    parser.add_argument("--edits", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--bare-weights", type=float, nargs="+", default=[1 / 3, 0.5, 0.8])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5], help="factors of the store's mu and lam")
    add_json(parser)
    options = parser.parse_args()
    with Store(options.store, write=False) as store:
        layer = options.layer % len(store.entries[0].about["priors"])
    keys, moment, lam, mu = read(options.store, layer)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(keys), WIDTH, generator=generator, dtype=torch.float64)
    found: list[dict[str, Any]] = []
    for count in (n for n in options.edits if n <= len(keys)):
        some, requested = keys[:count], values[:count]
        contexts = some.shape[1]
        kinds: dict[str, tuple[Tensor, Tensor]] = {
            f"contexts, bare {bare:.2f}": (some, torch.tensor([bare, *[(1 - bare) / (contexts - 1)] * (contexts - 1)]))
            for bare in options.bare_weights
        }
        kinds |= {"bare": (some[:, :1], torch.ones(1)), "mean": (some.mean(1, keepdim=True), torch.ones(1))}
        for scale in options.scales:
            precision = scale**2 * (mu**2 * moment + lam**2 * torch.eye(len(moment), dtype=torch.float64))
            for name, (rows, weights) in kinds.items():
                each = requested.repeat_interleave(rows.shape[1], dim=0)
                change = solve(rows.flatten(0, 1), weights.double().repeat(count), each, precision)
                bare, *rest = shares(change, some, requested)
                leakage = float((change * (moment @ change)).sum().clamp_min(0).sqrt() / requested.norm())
                found.append(
                    {
                        "edits": count,
                        "mu": scale * mu,
                        "rows": name,
                        "bare": bare,
                        "contexts": sum(rest) / len(rest),
                        "leakage": leakage,
                    }
                )
                print(
                    f"{count:6} edits, mu {scale * mu:6.2f}, {name:22} bare {bare:.3f}  contexts "
                    f"{sum(rest) / len(rest):.3f}  anchors {leakage:.4f}"
                )
    record(options.json, "Weight of the bare prompt's row, on the keys of a stream", layer=layer, figures=found)


if __name__ == "__main__":
    main()
