"""The plan of `rlsedit show --devices`: what each device holds if a model is divided over several, and what is sent."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.baselines.memory import beside, size
from rlsedit_fast.editing import EditConfig
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.tensor_parallel import (
    bytes_per_device,
    parallel_plan,
    process_counts,
    refused_count,
    style_of,
)
from rlsedit_fast.rls.layer import dtype_of
from rlsedit_fast.rls.plan import ShardMemory, edit_traffic, flush_traffic, shard_memory

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Attributes:
        count: number of devices.
        memory: bytes of each.
    """

    count: int
    memory: int


def devices(text: str) -> Devices:
    """Parses devices, such as `8x80GB`, for argparse.

    Raises:
        argparse.ArgumentTypeError: the text is not a number of devices and a size.
    """
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)([MGT]i?B)", text.strip(), re.IGNORECASE)
    if not found or int(found[1]) < 1 or float(found[2]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of devices and their memory, such as 8x80GB")
    return Devices(int(found[1]), int(float(found[2]) * _UNITS[found[3].upper()]))


def add_devices(parser: argparse.ArgumentParser) -> None:
    """Adds the option `--devices`."""
    parser.add_argument(
        "--devices",
        type=devices,
        metavar="COUNTxSIZE",
        help="show what each of several devices would hold and send, such as 8x80GB, with the model divided by tensor "
        "parallelism; only the config of the model is read",
    )


def plan_devices(
    model: Any, projections: Sequence[Projection], config: EditConfig, given: Devices, *, edits: int, rows: int
) -> dict[str, Any]:
    """Returns bytes per device, per batch and per flush, and whether the devices suffice.

    Args:
        model: the model, on any device (also meta).
        projections: the edited projections.
        config: the settings.
        given: the devices.
        edits: edits of a batch.
        rows: rows of a batch.

    Raises:
        InputError: the settings, or the number of devices, are not supported.
        ModelError: the layers cannot be divided.
    """
    _check(model, projections, config, given)
    chosen = _memory(model, projections, config.delay, given.count)
    fitting = (
        count
        for count in process_counts(model)
        if _memory(model, projections, config.delay, count).peak <= given.memory
    )
    sent = [
        edit_traffic(
            edits,
            rows,
            projection.value_width,
            projection.key_width,
            given.count,
            pending=config.delay,
            first=at == 0,
            item=_item(projection),
            read=projection.blocks[0].element_size(),
        )
        for at, projection in enumerate(projections)
    ]
    flushed = [
        flush_traffic(config.delay, projection.key_width, given.count, item=_item(projection))
        for projection in projections
    ]
    return {
        "devices": asdict(given),
        "weights": chosen.weights,
        "layers": [asdict(layer) for layer in chosen.layers],
        "state": chosen.state,
        "transient": chosen.transient,
        "peak": chosen.peak,
        "fits": chosen.peak <= given.memory,
        "smallest_count": next(fitting, None),
        "most": max(process_counts(model)),
        "host": sum(layer.anchors for layer in chosen.layers),
        "batch": {
            "edits": edits,
            "rows": rows,
            "sent": {kind: sum(layer.get(kind, 0) for layer in sent) for kind in (sent[0] if sent else {})},
        },
        "flush": {"rows": config.delay, "sent": sum(flushed)},
    }


def device_lines(plan: dict[str, Any]) -> list[str]:
    """Formats the result of `plan_devices` as text."""
    given, layers, sent = plan["devices"], plan["layers"], plan["batch"]["sent"]

    def total(part: str) -> str:
        return size(sum(layer[part] for layer in layers))

    smallest, number = plan["smallest_count"], given["count"]
    needed = (
        f"at least {smallest} such device{'s' * (smallest != 1)}"
        if smallest
        else f"no number of such devices suffices; the heads of the model are divided over at most {plan['most']}"
    )
    lines = [
        f"  {number} device{'s' * (number != 1)} of {size(given['memory'])}, with tensor parallelism; on each device:",
        f"    weights of the model   {size(plan['weights'])}",
        f"    states of {len(layers)} layers     {size(plan['state'])}: C {total('covariance')}, pending rows "
        f"{total('pending')}, original weights {total('original')}, exact weights {total('master')}",
        f"    at most in addition    {size(plan['transient'])}: while the first process builds a state "
        f"({size(max(layer['building'] for layer in layers))}), or all write a batch ({total('writing')})",
        f"    together               {size(plan['peak'])}: {'fits' if plan['fits'] else 'does not fit'}; {needed}",
        f"  host memory of each process: {size(plan['host'])} for anchors",
    ]
    if sent:
        kinds = ", ".join(f"{kind} {size(count)}" for kind, count in sorted(sent.items(), key=lambda item: -item[1]))
        lines += [
            f"  a batch of {plan['batch']['edits']} edits, {plan['batch']['rows']} rows, sends "
            f"{size(sum(sent.values()))} from each device: {kinds}",
            f"  folding {plan['flush']['rows']} pending rows into C sends {size(plan['flush']['sent'])} from each",
        ]
    return [*lines, "  not included: activations, cached keys and messages of the model, and what PyTorch itself needs"]


@dataclass(frozen=True)
class _Memory:
    """Bytes of the device that needs most."""

    weights: int
    layers: list[ShardMemory]

    @property
    def state(self) -> int:
        return sum(layer.state for layer in self.layers)

    @property
    def transient(self) -> int:
        return max(sum(layer.writing for layer in self.layers), *(layer.building for layer in self.layers))

    @property
    def peak(self) -> int:
        return self.weights + self.state + self.transient


def _memory(model: Any, projections: Sequence[Projection], delay: int, count: int) -> _Memory:
    layers = []
    for projection in projections:
        (weight,) = projection.blocks
        item = _item(projection)
        layers.append(
            shard_memory(
                projection.value_width,
                projection.key_width,
                count,
                delay=delay,
                item=item,
                weight=min(weight.element_size(), item),
                beside=beside(weight),
            )
        )
    return _Memory(bytes_per_device(model, count), layers)


def _item(projection: Projection) -> int:
    return dtype_of(projection.blocks[0]).itemsize


def _check(model: Any, projections: Sequence[Projection], config: EditConfig, given: Devices) -> None:
    if config.rule != RECURSIVE:
        raise InputError(f"rule={config.rule!r} is not divided over devices; --devices requires the rule rls")
    for projection in projections:
        if projection.layout is not None:
            raise InputError(
                f"{projection.name} is a mixture of experts, which --devices does not plan; omit --devices"
            )
    if given.count == 1:
        return
    if why := refused_count(model, given.count):
        raise InputError(f"{given.count} devices {why}")
    plan = parallel_plan(model)
    for projection in projections:
        style = style_of(plan, next(iter(projection.parameters)))
        if "row" not in (style or ""):
            raise ModelError(
                f"tensor parallelism of {type(model).__name__} does not divide the columns of {projection.name} (style "
                f"{style}), so its state cannot be divided"
            )
