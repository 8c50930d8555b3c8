"""Small launches of every kernel and configuration, for planted mistakes and for counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlsedit_fast.ops import cuda_plan

from .cuda_kernels import Kernels
from .launches import Launch


def symmetric(layers: int, d: int) -> Tensor:
    """Returns random symmetric matrices."""
    base = torch.randn(layers, d, d)
    return base.tril() + base.tril(-1).mT


def of_cuda(text: str) -> dict[str, Launch]:
    """Returns a launch of every kernel of csrc/cuda, by name.

    The sizes are such that loops run several times, tiles are partial and every barrier is reached.
    """
    torch.manual_seed(0)
    recorded: list[Launch] = []
    kernels = Kernels(text, recorded=recorded)

    def run(launches: list[cuda_plan.Launch]) -> None:
        for launch in launches:
            kernels.launch(launch, 0, 0)

    run(cuda_plan.downdate(symmetric(1, 200), torch.randn(1, 20, 200), torch.ones(1, 20)))
    for n in (3, cuda_plan.MAX_PANEL_EDITS):
        keys = torch.randn(1, n, 200)
        workspace = tuple(torch.empty(shape) for shape in cuda_plan.panel_workspace(1, n, 200))
        run(cuda_plan.panel(symmetric(1, 200), keys, torch.empty_like(keys), workspace))
    n, d_k, d_v = 130, 200, 8
    projected, innovation = torch.randn(1, n, d_k), torch.randn(1, n, d_v)
    outputs = (
        torch.empty_like(projected),
        torch.empty_like(innovation),
        torch.empty(1, n, n),
        torch.empty(1, dtype=torch.int32),
    )
    first, second = (torch.empty(shape) for shape in cuda_plan.factor_workspace(1, n, d_k))
    run(cuda_plan.factor(projected, projected, innovation, torch.ones(1, n), 1, outputs, (first, second)))
    found: dict[str, Launch] = {}
    for launch in recorded:
        found.setdefault(launch.program.kernel.name.removeprefix("rlsedit_"), launch)
    return found


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Selects the precision of the Triton kernels inside the block."""
    with mock.patch.dict("os.environ", {"RLSEDIT_TRITON_PRECISION": name}):
        yield


def is_default(text: str, capability: int, name: str) -> bool:
    """Whether a kernel of `of_triton` runs by default: in the default precision, or if it does not depend on one."""
    from rlsedit_fast.kernels.precision import default

    table = {"correct_split": "correct", "rows": "panel", "finish": "panel", "triangle": "panel"}
    kernel = text.split()[0].removesuffix("_kernel")
    independent = text.endswith(("bf16", "fp16")) or "EDITS=1 " in text or "EDITS=4 " in text
    return independent or name == default(table.get(kernel, kernel), f"sm_{capability}")


def of_triton(capability: int, name: str) -> dict[str, Launch]:
    """Returns a launch of every configuration of the Triton kernels in a precision, by kernel and settings."""
    return {text: launch for text, (launch, _) in of_triton_compiled(capability, name).items()}


def of_triton_compiled(capability: int, name: str) -> dict[str, tuple[Launch, Any]]:
    """`of_triton`, with Triton's compiled kernels.

    The sizes are such that loops run more often than copies are in flight.
    """
    from rlsedit_fast.kernels import correct, downdate, moment, panel

    from .triton_kernels import Host, on_host

    torch.manual_seed(0)
    host = Host(capability, recorded=[])
    with precision(name), on_host(host):
        for d, r in ((64, 32), (128, 160)):
            downdate.downdate_(symmetric(1, d), torch.randn(1, r, d), torch.ones(1, r))
        for n in (1, 4, 16, 32, 64, 100):
            if n <= panel.FEW and name != "ieee":
                continue  # no matrix product: the same code
            for variant in panel.VARIANTS if n <= panel.TRIANGLE_MAX_ROWS else panel.VARIANTS[:1]:
                given = (symmetric(1, 192), torch.randn(1, n, 192), torch.randn(1, 48, 192), torch.ones(1, 48))
                panel.panel(*given, variant=variant)
        for size, n in ((64, 32), (128, 160)):
            whitened, rows = torch.randn(1, n, size), torch.randn(1, n, size)
            correct.correct_(torch.randn(1, size, size), whitened, rows, 1)
            halves = torch.randn(1, size, size).bfloat16(), torch.zeros(1, size, size, dtype=torch.int16)
            correct.correct_split_(*halves, whitened, rows, 1)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if dtype == torch.float32 or name == "ieee":
                moment.moment_(symmetric(1, 128), torch.randn(1, 160, 128).to(dtype))
    found: dict[str, tuple[Launch, Any]] = {}
    for text, launch, compiled in zip(host.launched, host.recorded or (), host.compiled, strict=True):
        narrow = next((kind[1:] for kind in compiled.src.signature.values() if kind in ("*bf16", "*fp16")), "")
        found.setdefault(f"{text} {narrow}".strip(), (launch, compiled))
    return found
