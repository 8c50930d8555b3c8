"""Counts what the compiled kernels do, without a GPU, and predicts their time on an H200 from the counts.

The kernels run on the CPU by ptx_on_host. Counts are instructions of warps, wavefronts of shared memory, sectors of
global memory and multiplications of tensor cores; registers and shared memory are those of the compiled kernel.

The prediction is the largest of four times: bytes that must move at the rate of a copy, wavefronts at one per clock and
multiprocessor, instructions at four per clock and multiprocessor, products at the rate of the tensor cores. It assumes
that these overlap perfectly and that nothing waits, so it is a bound, not an estimate of what is measured. Counts of a
small matrix are scaled by the number of tiles.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import triton
from ptx_on_host import cases, counting, cuda_kernels
from ptx_on_host.launches import Launch
from recording import add_json, record

from rlsedit_fast.kernels import correct, downdate, panel
from rlsedit_fast.kernels.precision import PRECISIONS

# NVIDIA's H200 SXM data sheet (dense products), and the rate of a large copy.
H200 = {
    "multiprocessors": 132,
    "clock": 1.98e9,
    "copy": 4.3e12,  # bytes per second
    "tf32": 494.7e12 / 2,  # multiplications per second
    "bf16": 989.4e12 / 2,
}
D, D_V = 14336, 4096


@cache
def registers(cubin: bytes) -> int | None:
    """Returns the registers per thread of a compiled kernel, or None without the disassembler of triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+)", usage)
    return int(found[1]) if found else None


def row(launch: Launch) -> dict[str, object]:
    """Returns the counts of a launch."""
    counts = counting.counted(launch)
    worst = max(counts.shared, key=lambda one: one.ratio, default=None)
    return {
        "blocks": launch.grid[0] * launch.grid[1] * launch.grid[2],
        "threads": launch.threads,
        "shared_bytes": launch.shared,
        "instructions": counts.instructions,
        "wavefronts": counts.wavefronts,
        "least_wavefronts": counts.least_wavefronts,
        "worst_conflict": round(worst.ratio, 2) if worst else None,
        "sectors": counts.sectors,
        "least_sectors": counts.least_sectors,
        "products": counts.products,
        "barriers": counts.barriers,
        "full_waits": counts.waits,
    }


def table() -> list[dict[str, object]]:
    """Returns the counts of every kernel and configuration."""
    rows: list[dict[str, object]] = []
    for name, launch in cases.of_cuda(cuda_kernels.nvrtc_ptx()).items():
        rows.append({"kernel": name, "target": "CUDA, sm_80", **row(launch)})
    for capability in (80, 90):
        for precision in PRECISIONS:
            for name, (launch, compiled) in cases.of_triton_compiled(capability, precision).items():
                shipped = cases.is_default(name, capability, precision)
                rows.append(
                    {"kernel": name, "target": f"Triton, sm_{capability}", "precision": precision, "default": shipped}
                    | {"registers": registers(compiled.asm["cubin"]), **row(launch)}
                )
    return rows


def prediction(what: str, least_bytes: float, launches: list[tuple[Launch, float]]) -> dict[str, object]:
    """Returns the four times in milliseconds; each launch comes with the factor to scale its counts by."""
    clocks = H200["multiprocessors"] * H200["clock"]
    times = {"bytes": least_bytes / H200["copy"], "wavefronts": 0.0, "instructions": 0.0, "products": 0.0}
    for launch, scale in launches:
        counts = counting.counted(launch)
        times["wavefronts"] += scale * counts.wavefronts / clocks
        times["instructions"] += scale * counts.instructions / (4 * clocks)
        times["products"] += sum(scale * many / H200[kind] for kind, many in counts.products.items())
    milliseconds = {name: round(1e3 * time, 4) for name, time in times.items()}
    return {"what": what, **milliseconds, "predicted": max(milliseconds.values())}


def predictions() -> list[dict[str, object]]:
    """Returns predictions for one layer with d_k = 14336 and d_v = 4096 on sm_90."""
    from ptx_on_host.triton_kernels import Host, on_host

    rows = []
    for precision in ("tf32x3", "bf16x6"):
        for n in (16, 32, 64, 100):
            small = 512
            host = Host(90, processors=H200["multiprocessors"], recorded=[])
            with cases.precision(precision), on_host(host):
                panel.panel(
                    cases.symmetric(1, small), torch.randn(1, n, small), torch.empty(1, 0, small), torch.empty(1, 0)
                )
            factor = (D / small) ** 2
            launches = [
                (launch, factor if launch.program.kernel.name == "rows_kernel" else D / small)
                for launch in host.recorded or ()
            ]
            rows.append(prediction(f"panel n={n} {precision}", 4 * D * D + 8 * n * D, launches))
        for r in (32, 100):
            host = Host(90, recorded=[])
            with cases.precision(precision), on_host(host):
                downdate.downdate_(cases.symmetric(1, 256), torch.randn(1, r, 256), torch.ones(1, r))
            (launch,) = host.recorded or ()
            tiles = D // (64 if r <= 32 else 128)
            factor = tiles * (tiles + 1) / 2 / launch.grid[0]
            rows.append(prediction(f"downdate r={r} {precision}", 6 * D * D + 4 * r * D, [(launch, factor)]))
        for n in (32, 100):
            host = Host(90, recorded=[])
            with cases.precision(precision), on_host(host):
                correct.correct_(torch.randn(1, 128, 256), torch.randn(1, n, 128), torch.randn(1, n, 256), 1)
            (launch,) = host.recorded or ()
            factor = D_V * D / (128 * 256)
            rows.append(prediction(f"correct n={n} {precision}", 8 * D_V * D + 4 * n * (D_V + D), [(launch, factor)]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = table()
    for one in rows:
        print(
            f"{one['target']:15} {one['kernel']}: {one['instructions']} instructions, wavefronts {one['wavefronts']} "
            f"({one['least_wavefronts']} needed, worst {one['worst_conflict']}x), sectors {one['sectors']} "
            f"({one['least_sectors']}), {one['barriers']} barriers"
        )
    predicted = predictions()
    for one in predicted:
        print(one)
    record(args.json, "counts of compiled kernels, executed on a CPU", rows=rows, h200=H200, predictions=predicted)


if __name__ == "__main__":
    main()
