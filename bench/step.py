"""Times a step of the solver against alternatives on the same keys, in seconds per batch including flushes.

    ours       panel, factor, and pending rows until a flush, as in RLSState
    torch      efficient torch: C resident, F = K C by mm, C -= U^T U in place by addmm_
    released   the code released by the RLSEdit authors: a copy of C, C -= G G^T through temporaries, a second pass C K
    alphaedit  solve(P (K^T K + cache) + L2 I, P K^T R), float32
    memit      solve(mom2 + K^T K, K^T), float64

All of them whiten or solve for innovations of width d_v, and none writes the weight, which is the same work for all.
Complete updates including weight and checks are also timed: `update` is RLSState.update, `torch_update` is efficient
torch with W.addmm_. The contenders alternate within each round; results are medians over rounds. The solves run once,
on a GPU three times after a warm-up. RLSEDIT_BACKEND selects the backend of ours.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from recording import add_json, record
from torch import Tensor

import rlsedit_fast as rf
from rlsedit_fast import ops
from rlsedit_fast.ops import dispatch
from rlsedit_fast.rls.state import DEFAULT_DELAY

L2 = 10.0  # AlphaEdit's


class Batches:
    """Precomputed keys, whose precision stays well conditioned, and innovations, used in rotation."""

    def __init__(self, d: int, d_v: int, n: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        count = 4
        self._keys = torch.randn(count, n, d, generator=generator, device=device) / d**0.5
        self._innovations = torch.randn(count, n, d_v, generator=generator, device=device)
        self._at = 0

    def __call__(self) -> tuple[Tensor, Tensor]:
        self._at = (self._at + 1) % len(self._keys)
        return self._keys[self._at], self._innovations[self._at]


def whitened(projected: Tensor, keys: Tensor, innovation: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `U` and `A`, computed in PyTorch without a synchronization, which `cholesky` has on a GPU."""
    sigma = projected @ keys.T
    sigma.diagonal().add_(1)
    lower, _ = torch.linalg.cholesky_ex(sigma)
    solved = torch.linalg.solve_triangular(lower, torch.cat((projected, innovation), 1), upper=False)
    return solved[:, : keys.shape[1]], solved[:, keys.shape[1] :]


class Ours:
    """The operations as RLSState calls them."""

    def __init__(self, d: int, n: int, delay: int, device: torch.device) -> None:
        self._base, self._delay, self._count = torch.eye(d, device=device), delay, 0
        self._pending = torch.empty(delay + n, d, device=device)
        self._signs, self._noise = torch.ones(delay + n, device=device), torch.ones(n, device=device)

    def __call__(self, keys: Tensor, innovation: Tensor) -> None:
        projected = ops.panel(self._base, keys, self._pending[: self._count], self._signs[: self._count])
        rows, *_ = ops.factor(projected, keys, innovation, self._noise, 1)
        if self._count + len(keys) > self._delay and self._count:
            self.flush()
        self._pending[self._count : self._count + len(keys)] = rows
        self._count += len(keys)
        if self._count > self._delay:
            self.flush()

    def flush(self) -> None:
        ops.downdate_(self._base, self._pending[: self._count], self._signs[: self._count])
        self._count = 0


class Torch:
    """Efficient torch implementation, with or without the weight."""

    def __init__(self, d: int, device: torch.device, weight: Tensor | None = None) -> None:
        self._inverse, self._weight = torch.eye(d, device=device), weight

    def __call__(self, keys: Tensor, values: Tensor) -> None:
        projected = keys @ self._inverse
        innovation = values if self._weight is None else values - keys @ self._weight.T
        rows, solved = whitened(projected, keys, innovation)
        self._inverse.addmm_(rows.T, rows, alpha=-1)
        if self._weight is not None:
            self._weight.addmm_(solved.T, rows)


class Released:
    """The released step for one layer, without transfers between devices."""

    def __init__(self, d: int, device: torch.device) -> None:
        self._cache = torch.eye(d, device=device)

    def __call__(self, keys: Tensor, innovation: Tensor) -> None:
        cache = self._cache.clone()
        projected = cache @ keys.T
        sigma = torch.eye(len(keys), device=keys.device) + keys @ projected
        upper = torch.linalg.cholesky(sigma, upper=True)
        rows = torch.linalg.solve_triangular(upper, projected, upper=True, left=False)
        inverse = cache - rows @ rows.T
        cache.copy_(inverse)
        self._cache = cache
        inverse @ keys.T  # the released code computes the weight change from this


def alphaedit(keys: Tensor, innovation: Tensor, projection: Tensor, cache: Tensor) -> None:
    """The layer solve of AlphaEdit."""
    outer = keys.T @ keys
    left = projection @ (outer + cache)
    left.diagonal().add_(L2)
    torch.linalg.solve(left, projection @ keys.T @ innovation)
    cache += outer


def memit(keys: Tensor, moment: Tensor) -> None:
    """The layer solve of MEMIT, in float64 as released."""
    doubled = keys.double()
    torch.linalg.solve(moment.double() + doubled.T @ doubled, doubled.T)


def seconds(run: Callable[[], object], steps: int, device: torch.device) -> float:
    """Returns the seconds per step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps


def measure(d: int, n: int, delay: int, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Returns one row of the result."""
    d_v = options.d_v or d // 4
    batches = Batches(d, d_v, n, device)
    weight = torch.zeros(d_v, d, device=device)
    cycle = max(1, delay // n)  # steps between two flushes
    few = min(cycle, 8)

    def stream(step: Callable[[Tensor, Tensor], object]) -> Callable[[], object]:
        return lambda: step(*batches())

    def full() -> Callable[[], object]:
        state = rf.RLSState(weight, rf.Prior(lam=1.0), delay=delay)
        return stream(state.update)

    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "ours": (stream(Ours(d, n, delay, device)), cycle),
        "torch": (stream(Torch(d, device)), few),
        "released": (stream(Released(d, device)), min(few, 3)),
        "update": (full(), cycle),
        "torch_update": (stream(Torch(d, device, weight.clone())), few),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(options.rounds + 1):
        for name, (run, steps) in contenders.items():
            # On a GPU the first flush also loads kernels.
            first = steps if device.type == "cuda" else min(steps, 2)
            time_taken = seconds(run, steps if repeat else first, device)
            if repeat:  # the first round starts threads and touches memory
                times[name].append(time_taken)
    row = {f"{name}_s": statistics.median(found) for name, found in times.items()}
    if not options.no_solves:
        keys, innovation = batches()
        square = torch.eye(d, device=device)
        solves: dict[str, Callable[[], object]] = {
            "alphaedit": lambda: alphaedit(keys, innovation, square, torch.eye(d, device=device)),
            "memit": lambda: memit(keys, square),
        }
        for name, solve in solves.items():
            if device.type == "cuda":
                solve()  # creates the solver handle and workspaces
            row[f"{name}_s"] = seconds(solve, 3 if device.type == "cuda" else 1, device)
    return {"d": d, "n": n, "d_v": d_v, "delay": delay, **row}


def draw(rows: list[dict[str, float]], machine: str, file: Path) -> None:
    """Draws milliseconds per batch by n, one panel per d."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    widths = sorted({int(row["d"]) for row in rows})
    figure, panels = plt.subplots(1, len(widths), figsize=(5 * len(widths), 4), squeeze=False, layout="constrained")
    for axes, d in zip(panels[0], widths, strict=True):
        here = [row for row in rows if row["d"] == d]
        for name in ("ours", "torch", "released", "memit", "alphaedit"):
            points = [(row["n"], 1e3 * row[f"{name}_s"]) for row in here if f"{name}_s" in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", linewidth=2 if name == "ours" else 1, label=name)
        axes.set(xscale="log", yscale="log", xlabel="edits per batch", ylabel="ms per batch", title=f"d_k = {d}")
        axes.set_xticks(
            sorted({row["n"] for row in here}), [str(row["n"]) for row in sorted(here, key=lambda r: r["n"])]
        )
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0][0].legend(frameon=False)
    figure.suptitle(machine, fontsize=9)
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--d-v", type=int, help="value dimension (default: d / 4)")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 16, 32, 64, 100])
    parser.add_argument("--delay", type=int, nargs="+", default=[DEFAULT_DELAY], help="maximum number of pending rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-solves", action="store_true", help="skip the slow solves of AlphaEdit and MEMIT")
    add_json(parser)
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write a chart to FILE (requires matplotlib)")
    options = parser.parse_args()
    device = torch.device(options.device)
    rows = []
    for d, n, delay in itertools.product(options.d, options.n, options.delay):
        row = measure(d, n, delay, options, device)
        rows.append(row)
        shown = {k: f"{1e3 * v:.1f}" for k, v in row.items() if k.endswith("_s")}
        ratios = {k[:-2]: round(v / row["ours_s"], 2) for k, v in row.items() if k.endswith("_s") and k != "ours_s"}
        print(f"d {d} n {n} delay {delay} ms {shown}", f"times ours {ratios}", sep="\n  ", flush=True)
        about = {"device": options.device, "backend": dispatch.requested(None), "rounds": options.rounds}
        record(options.json, "a step of the solver", **about, rows=rows)  # keep finished rows if a later one fails
    if options.chart:
        draw(rows, str(torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"), options.chart)


if __name__ == "__main__":
    main()
