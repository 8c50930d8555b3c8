"""Memory that editing needs, computed from shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlsedit_fast.baselines.base import Rule
from rlsedit_fast.errors import ResourceError
from rlsedit_fast.rls.layer import dtype_of
from rlsedit_fast.rls.prior import CHUNK

if TYPE_CHECKING:
    from torch import Tensor

    from rlsedit_fast.models.linear import Projection
    from rlsedit_fast.rls import BlockLayout

_FLOAT, _DOUBLE = 4, 8


@dataclass(frozen=True)
class LayerMemory:
    """Bytes that an edited layer needs in addition to the model.

    Attributes:
        layer: index of the decoder layer.
        name: name of the projection.
        device: device of the projection, on which the memory is allocated.
        state: during the lifetime of the editor: C and pending rows, or the memory of another rule, at most; W0; the
            part of the exact weight that the model does not hold. For a mixture of experts at most, since experts that
            no edit reaches take none.
        anchors: anchor moment, if there is one, in host memory, during the lifetime of the editor.
        writing: additional bytes while a batch is written: a copy of the weight for a rollback.
        building: additional bytes while the state is built in float64; other rules need them for each batch. A rebuild
            also needs some copies of W and keeps the old C of every layer until all layers are done.
        per_edit: stored rows of an edit, in host memory; in the last layer including the states that they aim at.
        applied: bytes on the device per applied edit of a mixture of experts; 0 for other layers, which do not grow.
        pairs: the same per pair of applied edits, for the factor of the dual system and a copy of it during a step.
    """

    layer: int
    name: str
    device: str
    state: int
    anchors: int
    writing: int
    building: int
    per_edit: int
    applied: int = 0
    pairs: int = 0


def plan_memory(
    projections: Sequence[Projection],
    *,
    delay: int,
    rows: int = 1,
    rule: Rule | None = None,
    growing: bool = True,
) -> list[LayerMemory]:
    """Returns the memory that editing needs, per projection, computed from shapes.

    Args:
        projections: the edited projections.
        delay: see `RLSState`.
        rows: number of rows of an edit in each layer.
        rule: the baseline rule; None for `rls`.
        growing: whether the state of a mixture of experts grows, see `EditConfig.experts`.
    """
    return [
        _mixture_memory(projection, projection.layout, rows, rule, projection is projections[-1], growing)
        if projection.layout is not None
        else _layer_memory(projection, delay, rows, rule, projection is projections[-1])
        for projection in projections
    ]


def _layer_memory(projection: Projection, delay: int, rows: int, rule: Rule | None, last: bool) -> LayerMemory:
    """Returns the memory of a layer with a single weight."""
    (weight,) = projection.blocks
    (d_v, held), d_k = weight.shape, projection.key_width
    item = dtype_of(weight).itemsize
    kept = weight.numel() * (min(weight.element_size(), _DOUBLE) + beside(weight))
    if rule is None:
        # C; pending rows, whose buffer doubles once if a batch finds it full; the sketch of the monitor
        kept += item * (held * d_k + 2 * delay * (held + 1)) + 2 * _DOUBLE * held
        # S0, which its factor replaces, and chunks; C and W are counted above
        building = d_k * d_k + 2 * max(CHUNK, d_k // 16) * d_k
    else:
        kept += _DOUBLE * rule.memory_numel(d_v, d_k)
        # W, its change and the sum; the memory of the rule with the batch, its factor and a copy
        building = 3 * d_v * d_k + (3 * d_k * d_k if rule.memory_numel(d_v, d_k) >= d_k * d_k else 0)
    return LayerMemory(
        projection.layer,
        projection.name,
        str(weight.device),
        kept,
        _FLOAT * d_k * d_k,
        item * weight.numel(),
        _DOUBLE * building,
        rows * (item * (d_k + d_v) + (_FLOAT * d_v if last else 0)),
    )


def _mixture_memory(
    projection: Projection, layout: BlockLayout, rows: int, rule: Rule | None, last: bool, growing: bool
) -> LayerMemory:
    """Returns the memory of a mixture of experts, if edits reach all of its experts."""
    blocks, d_v = projection.blocks, projection.value_width
    item = dtype_of(blocks[0]).itemsize
    weights = sum(block.numel() for block in blocks)
    squares = sum(block.shape[1] ** 2 for block in blocks)
    state = item * squares * (1 if growing else 2)
    if rule is not None:
        state = _DOUBLE * sum(rule.memory_numel(*block.shape) for block in blocks)
    features = layout.key_width - layout.active
    return LayerMemory(
        projection.layer,
        projection.name,
        str(projection.device),
        weights * (min(blocks[0].element_size(), _DOUBLE) + beside(blocks[0])) + state,
        _FLOAT * squares,
        (item if not beside(blocks[0]) else blocks[0].element_size() + beside(blocks[0])) * weights,
        _DOUBLE * 3 * max(block.shape[1] for block in blocks) ** 2,
        rows * (item * (layout.key_width + d_v) + (_FLOAT * d_v if last else 0)),
        # keys and projected keys; innovations, and the same whitened, in float64
        applied=growing * rows * (item * (layout.key_width + features) + 2 * _DOUBLE * d_v),
        pairs=growing * 2 * _DOUBLE * rows * rows,
    )


def beside(weight: Tensor) -> int:
    """Returns the bytes per entry of the exact weight that the model does not hold."""
    return {torch.float32: 0, torch.float64: 0, torch.bfloat16: 2}.get(weight.dtype, _FLOAT)


def check_memory(layers: Sequence[LayerMemory]) -> None:
    """Compares a plan with the free memory of each device; devices that do not report it are not checked.

    Raises:
        ResourceError: there is not enough memory.
    """
    wanted: dict[str, int] = defaultdict(int)
    writing: dict[str, int] = defaultdict(int)
    building: dict[str, int] = defaultdict(int)
    for layer in layers:
        wanted[layer.device] += layer.state  # the anchors are already in memory
        writing[layer.device] += layer.writing
        building[layer.device] = max(building[layer.device], layer.building)
    for device, bytes_wanted in wanted.items():
        more = max(writing[device], building[device])
        total, free = bytes_wanted + more, available(torch.device(device))
        if free is not None and total > free:
            raise ResourceError(
                f"editing needs {size(total)} on {device} ({size(bytes_wanted)} permanently, {size(more)} while states "
                f"are built or written) and {size(free)} are free; nothing was modified. Edit fewer layers, or "
                "distribute the model over more devices with device_map"
            )


def available(device: torch.device) -> int | None:
    """Returns the free bytes on a device, within the limit of a container; None if unknown."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        free, whole = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - allocated
        # A process may be limited to a fraction of the device; torch before 2.8 does not report it.
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 1.0)(device)
        return min(free, max(0, int(share * whole) - allocated))
    if device.type != "cpu":
        return None
    figures = [_meminfo(), _container()]
    known = [figure for figure in figures if figure is not None]
    return min(known) if known else None


def size(count: int) -> str:
    """Formats a number of bytes."""
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
