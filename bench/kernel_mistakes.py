"""Removes every barrier, fence and wait of the compiled kernels in turn, and counts what becomes of each mistake.

These are the CUDA kernels and the default configurations of the Triton kernels; `make soak` tests the others too.
"""

from __future__ import annotations

import argparse
from collections import Counter

from ptx_on_host import cases, cuda_kernels, mistakes
from ptx_on_host.launches import Launch
from recording import add_json, record

from rlsedit_fast.kernels.precision import PRECISIONS


def row(kernel: str, target: str, launch: Launch) -> dict[str, object]:
    """Plants all mistakes in a launch and returns their numbers by kind and outcome."""
    found = mistakes.outcomes(launch)
    together = mistakes.redundant_together(launch, found)
    states = Counter((outcome.mistake.kind, outcome.state) for outcome in found)
    by_kind: dict[str, dict[str, int]] = {}
    for (kind, state), count in sorted(states.items()):
        by_kind.setdefault(kind, {})[state] = count
    redundant = sum(outcome.state == "redundant" for outcome in found)
    return {
        "kernel": kernel,
        "target": target,
        "mistakes": len(found),
        "found": sum(outcome.state == "found" for outcome in found),
        "redundant": redundant,
        "redundant_together": len(together),
        "not_reached": sum(outcome.state == "not reached" for outcome in found),
        "by_kind": by_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    args = parser.parse_args()
    rows = []
    for name, launch in cases.of_cuda(cuda_kernels.nvrtc_ptx()).items():
        rows.append(row(name, "CUDA, sm_80", launch))
        print(rows[-1], flush=True)
    for capability in (80, 90):
        for precision in PRECISIONS:
            for name, launch in cases.of_triton(capability, precision).items():
                if not cases.is_default(name, capability, precision):
                    continue
                rows.append(row(name, f"Triton, sm_{capability}", launch))
                print(rows[-1], flush=True)
    totals: Counter[str] = Counter()
    for one in rows:
        for kind, states in one["by_kind"].items():
            totals.update({f"{kind}: {state}": count for state, count in states.items()})
    for name, count in sorted(totals.items()):
        print(f"{name} {count}")
    record(args.json, "planted mistakes in compiled kernels", rows=rows, totals=dict(sorted(totals.items())))


if __name__ == "__main__":
    main()
