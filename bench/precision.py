"""Accuracy of the solver with float32 products emulated as on tensor cores.

The solver runs unchanged (panel, factorization, deferred downdate, correction) with emulated products in `panel`,
`downdate_` and `correct_`: operands are split into tf32 or bfloat16 parts as in Triton, products of parts are exact,
and sums are rounded as in float32 or truncated toward zero after every eight products, a pessimistic model of a tensor
core. Errors of C and W are relative Frobenius norms against the normal equations in float64. Larger key norms mean
stronger edits, which subtract more from C.

    python bench/precision.py --json bench/results/precision.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from recording import add_json, record
from solver_accuracy import spectrum_moment
from torch import Tensor

from rlsedit_fast.errors import UpdateError
from rlsedit_fast.ops import reference
from rlsedit_fast.rls import Prior, RLSState
from rlsedit_fast.rls.reference import solve_all
from rlsedit_fast.rls.state import DEFAULT_DELAY

SEED = 11
CUT = 8  # number of products that are summed exactly before truncation
TF32_DROPPED = 13  # bits of float32 that tf32 lacks


def tf32(x: Tensor) -> Tensor:
    """Rounds to the nearest tf32, ties away from zero, like `cvt.rna.tf32.f32`."""
    bits = x.contiguous().view(torch.int32) + (1 << (TF32_DROPPED - 1))
    return (bits >> TF32_DROPPED << TF32_DROPPED).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


# name: (how a part is rounded, number of parts); products of parts i and j are kept while i + j < number of parts
PRECISIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "ieee": (lambda x: x, 1),
    "tf32x3": (tf32, 2),
    "bf16x6": (bf16, 3),
    "bf16x3": (bf16, 2),
    "tf32": (tf32, 1),
    "bf16": (bf16, 1),
}


def parts(x: Tensor, name: str) -> list[Tensor]:
    """Splits `x` into parts, largest first."""
    rounded, count = PRECISIONS[name]
    taken = []
    for _ in range(count):
        taken.append(rounded(x))
        x = x - taken[-1]
    return taken


def cut_product(a: Tensor, b: Tensor) -> Tensor:
    """Returns `a @ b` in float32 with sums truncated toward zero after every `CUT` products."""
    total = a.new_zeros(a.shape[0], b.shape[1])
    for left, right in zip(a.split(CUT, 1), b.split(CUT, 0), strict=True):
        exact = total.double() + left.double() @ right.double()
        near = exact.float()
        total = torch.where(near.double().abs() > exact.abs(), torch.nextafter(near, torch.zeros_like(near)), near)
    return total


def product(a: Tensor, b: Tensor, name: str, cut: bool = False) -> Tensor:
    """Returns `a @ b` in the given precision, small products first."""
    left, right = parts(a, name), parts(b, name)
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < len(left)]
    total = a.new_zeros(a.shape[0], b.shape[1])
    for i, j in sorted(pairs, key=sum, reverse=True):
        total += (cut_product if cut else torch.matmul)(left[i], right[j])
    return total


def operations(name: str, cut: bool) -> dict[str, Callable[..., Any]]:
    """Returns `panel`, `downdate_` and `correct_` of the reference backend with emulated products."""

    def panel(base: Tensor, keys: Tensor, pending: Tensor, signs: Tensor) -> Tensor:
        projected = product(keys, base, name, cut)
        if pending.shape[0]:
            projected -= product(product(keys, pending.T, name, cut) * signs, pending, name, cut)
        return projected

    def downdate_(base: Tensor, pending: Tensor, signs: Tensor) -> None:
        change = product((pending * signs[:, None]).T, pending, name, cut)
        base -= change.tril() + change.tril(-1).T

    def correct_(weight: Tensor, whitened: Tensor, rows: Tensor, sign: int) -> None:
        weight += sign * product(whitened.T, rows, name, cut)

    return {"panel": panel, "downdate_": downdate_, "correct_": correct_}


def stream(
    name: str, cut: bool, norm: float, *, d: int, d_v: int, updates: int, batch: int, condition: float
) -> dict[str, Any]:
    """Runs one stream of updates in the given precision with keys of the given norm.

    Returns:
        Number of `updates`; the errors of `C` and `W`, the smallest eigenvalue of C relative to the true one, and
        whether C is positive definite. The errors are None if a factorization failed.
    """
    generator = torch.Generator().manual_seed(SEED)
    prior = Prior(lam=0.0, mu=1.0, anchor_moment=spectrum_moment(d, condition, generator))
    original = torch.randn(d_v, d, generator=generator)
    keys = norm * torch.nn.functional.normalize(torch.randn(updates * batch, d, generator=generator), dim=1)
    values = torch.randn(updates * batch, d_v, generator=generator)
    row: dict[str, Any] = {"key_norm": norm, "precision": name, "sums": "cut off" if cut else "float32", "updates": 0}
    with mock.patch.dict(reference.OPS, operations(name, cut)):
        state = RLSState(original, prior, dtype=torch.float32, delay=DEFAULT_DELAY, backend="reference")
        for k, v in zip(keys.split(batch), values.split(batch), strict=True):
            try:
                state.update(k, v)
            except UpdateError:
                return row | {"C": None, "W": None, "smallest_eigenvalue": None, "positive_definite": False}
            row["updates"] += 1
        found = state.precision_inverse().double()
    weight, inverse, _ = solve_all(original, prior, keys, values)
    smallest = float(torch.linalg.eigvalsh(found)[0] / torch.linalg.eigvalsh(inverse)[0])
    return row | {
        "C": float((found - inverse).norm() / inverse.norm()),
        "W": float((state.weight.double() - weight).norm() / weight.norm()),
        "smallest_eigenvalue": smallest,
        "positive_definite": smallest > 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--d-v", type=int, default=128)
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--batch", type=int, default=2, help="rows per update")
    parser.add_argument("--condition", type=float, default=2e5)
    parser.add_argument("--norms", type=float, nargs="+", default=[1.0, 5.0], help="norms of the keys")
    add_json(parser)
    options = parser.parse_args()

    sizes = {name: getattr(options, name) for name in ("d", "d_v", "updates", "batch", "condition")}
    heads = f"{'keys':>5} {'precision':10} {'sums':8} {'updates':>7} {'error of C':>11} {'of W':>9}"
    print(f"{heads} {'min eigenvalue':>17}")
    results = []
    for norm in options.norms:
        for name in PRECISIONS:
            for cut in (False, True):
                row = stream(name, cut, norm, **sizes)
                results.append(row)
                c, w = ("-" if row[key] is None else format(row[key], ".1e") for key in ("C", "W"))
                least = "-" if row["smallest_eigenvalue"] is None else format(row["smallest_eigenvalue"], ".4f")
                print(f"{norm:5g} {name:10} {row['sums']:8} {row['updates']:7} {c:>11} {w:>9} {least:>17}", flush=True)
    record(options.json, "precision of products", sizes=sizes, seed=SEED, results=results)


if __name__ == "__main__":
    main()
