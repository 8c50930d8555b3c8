"""How much memory editing takes, told before it is taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlsedit_fast.baselines import Rule
from rlsedit_fast.errors import ResourceError
from rlsedit_fast.models.projections import Projection
from rlsedit_fast.rls.prior import CHUNK
from rlsedit_fast.rls.state import dtype_of

_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that one edited layer takes beside the model.

    Attributes:
        layer: index of the block.
        name: of the projection.
        device: where it lies, and so where this is taken.
        state: for as long as the editor lives: C and pending rows, or what another rule remembers, at most; W0; the
            part of the master that the model has not.
        anchors: where there are any, their moment, for as long as the editor lives, in the host's memory.
        writing: more, while a batch is written: a copy of the weight to go back to.
        building: more, for the moment in which the state is made in float64; other rules compute each batch so. A
            rebuild takes some copies of W besides, and keeps the old C of every layer until it is through.
        per_edit: of the rows of an edit, by which it can be taken back, in host memory; in the last layer with the
            states that they ask for.
    """

    layer: int
    name: str
    device: str
    state: int
    anchors: int
    writing: int
    building: int
    per_edit: int


def plan(
    projections: Sequence[Projection], *, delay: int, rows: int = 1, rule: Rule | None = None
) -> list[LayerMemory]:
    """What editing these projections takes, computed from shapes alone.

    Args:
        projections: the edited ones.
        delay: as in `RLSState`.
        rows: of an edit in each layer.
        rule: None for the recursive one.
    """
    layers = []
    for projection in projections:
        weight = projection.weight
        d_v, d_k = weight.shape
        item = dtype_of(weight).itemsize
        beside = {torch.float32: 0, torch.float64: 0, torch.bfloat16: 2}.get(weight.dtype, _FLOAT)
        kept = weight.numel() * (min(weight.element_size(), _DOUBLE) + beside)
        if rule is None:
            # C; pending rows, whose buffer doubles once with batches that find it full; the monitor's sketch
            kept += item * (d_k * d_k + 2 * delay * (d_k + 1)) + 2 * _DOUBLE * d_k
            # S0, which its factor replaces, and chunks; C and W are told above
            building = d_k * d_k + 2 * max(CHUNK, d_k // 16) * d_k
        else:
            kept += _DOUBLE * rule.memory_numel(d_v, d_k)
            # W, its change and the sum; what it remembers, with the batch, its factor and a copy
            building = 3 * d_v * d_k + (3 * d_k * d_k if rule.memory_numel(d_v, d_k) >= d_k * d_k else 0)
        layers.append(
            LayerMemory(
                projection.layer,
                projection.name,
                str(weight.device),
                kept,
                _FLOAT * d_k * d_k,
                item * weight.numel(),
                _DOUBLE * building,
                rows * (item * (d_k + d_v) + (_FLOAT * d_v if projection is projections[-1] else 0)),
            )
        )
    return layers


def check(layers: Sequence[LayerMemory]) -> None:
    """Compares a plan with what is free, device by device; a device that does not tell is taken at its word.

    Raises:
        ResourceError: there is too little, with the figures and what to do.
    """
    wanted: dict[str, int] = defaultdict(int)
    writing: dict[str, int] = defaultdict(int)
    building: dict[str, int] = defaultdict(int)
    for layer in layers:
        wanted[layer.device] += layer.state  # the anchors are there already
        writing[layer.device] += layer.writing
        building[layer.device] = max(building[layer.device], layer.building)
    for device, bytes_wanted in wanted.items():
        more = max(writing[device], building[device])
        total, free = bytes_wanted + more, available(torch.device(device))
        if free is not None and total > free:
            raise ResourceError(
                f"editing takes {size(total)} on {device} ({size(bytes_wanted)} to stay, {size(more)} while states "
                f"are made or written) and {size(free)} are free; nothing was changed. Edit fewer layers, or spread "
                "the model over more devices with device_map"
            )


def available(device: torch.device) -> int | None:
    """Free bytes on a device, None where that cannot be told; within a container, what its limit leaves."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        free, whole = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - allocated
        # A program may have been given a share of the device; torch before 2.8 does not tell.
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 1.0)(device)
        return min(free, max(0, int(share * whole) - allocated))
    if device.type != "cpu":
        return None
    figures = [_meminfo(), _container()]
    known = [figure for figure in figures if figure is not None]
    return min(known) if known else None


def size(count: int) -> str:
    """Bytes for a person."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.3g} {units[0]}"


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (folder / "memory.max").read_text().strip(), (folder / "memory.current").read_text().strip()
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return None if limit == "max" else int(limit) - int(used) + int(cached.get("inactive_file", 0))
    except (OSError, ValueError):
        return None
