"""Runs every kernel of a backend once on small operands of odd size, for compute-sanitizer; results are not checked."""

from __future__ import annotations

import argparse

import torch

from rlsedit_fast import ops
from rlsedit_fast.ops import dispatch

LAYERS, D, D_V = 2, 133, 40
EDITS = (3, 7, 150)  # both panel kernels for few edits; one factor panel, and several


def calls(n: int) -> dict[str, tuple[object, ...]]:
    """Returns the arguments of each operation."""
    base = torch.eye(D, device="cuda").repeat(LAYERS, 1, 1)
    keys, innovation = (torch.randn(LAYERS, n, width, device="cuda") for width in (D, D_V))
    ones = torch.ones(LAYERS, n, device="cuda")
    weight = torch.randn(LAYERS, D_V, D, device="cuda")
    return {
        "panel": (base, keys, 0.01 * keys, ones),
        "factor": (keys, keys, innovation, ones, 1),
        "downdate_": (base, 0.01 * keys, ones),
        "correct_": (weight, innovation, keys, 1),
        "correct_split_": (*ops.split(weight), innovation, keys, 1),
        "moment_": (base, keys),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", choices=("cuda", "triton"))
    name = parser.parse_args().backend
    ran = 0
    for n in EDITS:
        for op, given in calls(n).items():
            reason = dispatch.unsupported_reason(name, op, [t for t in given if isinstance(t, torch.Tensor)])
            print(f"n={n} {op}: {reason or 'run'}", flush=True)
            if reason is None:
                getattr(ops, op)(*given, backend=name)
                ran += 1
        if name == "triton":
            from rlsedit_fast.kernels import panel

            for variant in panel.VARIANTS if n <= panel.TRIANGLE_MAX_ROWS else ("full",):
                print(f"n={n} panel {variant}", flush=True)
                panel.panel(*calls(n)["panel"], variant=variant)
    torch.cuda.synchronize()
    if not ran:
        parser.exit(1, f"backend {name!r} supports none of the operations on this machine\n")


if __name__ == "__main__":
    main()
