"""Compares one call for all layers with one call per layer, for the operations of a step.

    python bench/layers_together.py --json bench/results/layers-together-cpu.json

Every operation accepts a leading dimension of layers on its tensors. `together_ms` is a step of all layers with one
call per operation on stacked tensors; `apart_ms` is the same step layer by layer. A step is panel, factor, correction;
`flush_*` is the downdate that follows once per `DELAY` rows. `ratio` is apart / together: above 1 the common call is
faster. The two alternate, and times are medians. Shapes: the seven layers of SmolLM2-135M, five layers with d_k 4,096,
and experts of a mixture, whose many small states are the case in which a common call can help.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from recording import add_json, record
from side_by_side import medians
from torch import Tensor

from rlsedit_fast import ops

DELAY = 256
SHAPES = {
    "SmolLM2-135M, 7 layers": (7, 1536, 576),
    "d_k 4096, 5 layers": (5, 4096, 1024),
    "64 experts, d_k 768": (64, 768, 2048),
}


def problem(layers: int, d_k: int, d_v: int, rows: int, device: str) -> dict[str, Tensor]:
    """Returns stacked states with half-full pending rows, and a batch of `rows` rows per layer."""
    torch.manual_seed(0)
    random = {
        "keys": (layers, rows, d_k),
        "innovation": (layers, rows, d_v),
        "pending": (layers, DELAY // 2, d_k),
        "weight": (layers, d_v, d_k),
    }
    found = {name: torch.randn(shape, device=device) / shape[-1] ** 0.5 for name, shape in random.items()}
    found["pending"] *= 0.01
    found["base"] = torch.eye(d_k, device=device).repeat(layers, 1, 1)
    found["signs"] = torch.ones(layers, DELAY // 2, device=device)
    found["noise"] = torch.ones(layers, rows, device=device)
    return found


def step(state: dict[str, Tensor]) -> None:
    """Runs the operations of a step on one layer, or on all layers of stacked tensors."""
    projected = ops.panel(state["base"], state["keys"], state["pending"], state["signs"])
    rows, whitened, _, _ = ops.factor(projected, state["keys"], state["innovation"], state["noise"], 1)
    ops.correct_(state["weight"], whitened, rows, 1)


def measure(name: str, rows: int, repeats: int, device: str) -> dict[str, Any]:
    layers, d_k, d_v = SHAPES[name]
    together = problem(layers, d_k, d_v, rows, device)
    apart = [{key: value[at].contiguous() for key, value in together.items()} for at in range(layers)]
    synchronize: Callable[[], object] = torch.cuda.synchronize if device != "cpu" else lambda: None

    def timed(run: Callable[[], object]) -> Callable[[], None]:
        def whole() -> None:
            run()
            synchronize()

        return whole

    runs: dict[str, Callable[[], object]] = {
        "together": lambda: step(together),
        "apart": lambda: [step(one) for one in apart],
        "flush_together": lambda: ops.downdate_(together["base"], together["pending"], together["signs"]),
        "flush_apart": lambda: [ops.downdate_(one["base"], one["pending"], one["signs"]) for one in apart],
    }
    found = medians({key: timed(run) for key, run in runs.items()}, repeats)
    return {
        "shape": name,
        "layers": layers,
        "d_k": d_k,
        "d_v": d_v,
        "rows": rows,
        **{f"{key}_ms": value for key, value in found.items()},
        "ratio": found["apart"] / found["together"],
        "flush_ratio": found["flush_apart"] / found["flush_together"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[3, 30, 300])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=9)
    add_json(parser)
    options = parser.parse_args()
    results = []
    for name in options.shapes:
        for rows in options.rows:
            row = measure(name, rows, options.repeats, options.device)
            print(f"{name}, {rows} rows: step {row['ratio']:.2f}, flush {row['flush_ratio']:.2f}", flush=True)
            results.append(row)
    record(options.json, "one call for all layers against one call per layer", device=options.device, rows=results)


if __name__ == "__main__":
    main()
