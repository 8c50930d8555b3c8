"""Time of the exact terms of the objective, tracked through the steps and measured directly, against that of a step.

    python bench/terms.py --json bench/results/terms-cpu.json

Medians of repeated steps of n rows on one layer, float32, with an anchor moment. `tracked` is `RLSState.terms` after
each step, which evaluates the rows since the last call. `direct` measures the anchors from the weight each time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
from recording import add_json, record

import rlsedit_fast as rf
from rlsedit_fast.rls.terms import AnchorChange

SHAPES = [(576, 1536)]
ROWS = [3, 30, 300]
REPEATS = 5


def seconds(action) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_json(parser)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for d_v, d_k in SHAPES:
        anchors = torch.randn(2 * d_k, d_k, generator=generator)
        moment = anchors.T @ anchors / len(anchors)
        state = rf.RLSState(torch.randn(d_v, d_k, generator=generator), rf.Prior(lam=1.0, mu=5.0, anchor_moment=moment))
        for n in ROWS:
            times: dict[str, list[float]] = {"step": [], "tracked": [], "direct": []}
            values = []
            for _ in range(REPEATS):
                keys, wanted = torch.randn(n, d_k, generator=generator), torch.randn(n, d_v, generator=generator)
                times["step"].append(seconds(partial(state.update, keys, wanted)))
                times["tracked"].append(seconds(state.terms))
                tracked = state.terms().anchors
                state._anchor_change = AnchorChange(None)
                times["direct"].append(seconds(state.terms))
                values.append(abs(tracked / state.terms().anchors - 1))
            medians = {name: statistics.median(some) for name, some in times.items()}
            row = {"d_v": d_v, "d_k": d_k, "rows": n, **{f"{name}_ms": 1e3 * one for name, one in medians.items()}}
            row |= {"tracked_per_step": medians["tracked"] / medians["step"], "difference": max(values)}
            rows.append(row)
            print({name: round(value, 9) for name, value in row.items()}, flush=True)
    record(options.json, "Exact terms of the objective: tracked and measured directly", rows=rows)


if __name__ == "__main__":
    main()
