"""Simulates the time of a solver step on several devices from counted bytes and operations. Nothing is measured.

    python bench/communication.py --json FILE

For layers of 70B and 405B models and several numbers of devices: the time that all edited layers need for a batch with
delayed updates, for sending the keys and changes that the editor of a bfloat16 model reads in addition, and for folding
the pending rows into C, which happens once every `delay` rows. Value search and forward passes are not included.

A computation takes the longer of its operations over the FLOP rate and its bytes over the memory bandwidth, both times
`--attained`. What a process sends (`rls.plan`) takes its bytes over the bandwidth of NVLink within a host; with several
hosts, over the network card that the devices of a host share, whichever is slower; and a latency for each collective.
Communication and computation do not overlap. The default rates are those of data sheets of H100 SXM devices in hosts
of 8, with one card of 100 Gb/s.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from typing import Any

from recording import add_json, record

from rlsedit_fast.rls.plan import batch_traffic, edit_traffic, flush_traffic, held_width

MODELS = {"70B": (8192, 28672, 8), "405B": (16384, 53248, 16)}
"""Width of values, width of keys, and number of devices in question."""

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
READING = 6  # collectives for what the editor reads in addition, per layer on average
COLLECTIVES = 30  # of a batch and layer: gathering, and reductions that are broadcast, of which decisions are most


@dataclass(frozen=True)
class Rates:
    """Rates of a device and its connections.

    Attributes:
        flops: float32 operations per second.
        doubles: float64 operations per second.
        memory: bytes per second of the device memory.
        attained: fraction of these rates that the kernels attain.
        link: bytes per second that a device sends within a host.
        network: bytes per second that a host sends.
        link_latency: seconds of a collective within a host.
        network_latency: seconds of a collective over several hosts.
        per_host: devices of a host.
    """

    flops: float = 67e12
    doubles: float = 34e12
    memory: float = 3.35e12
    attained: float = 0.6
    link: float = 450e9
    network: float = 12.5e9
    link_latency: float = 20e-6
    network_latency: float = 60e-6
    per_host: int = 8

    def compute(self, flops: float, moved: float, doubles: float = 0.0) -> float:
        """Returns the seconds of a computation with float32 and float64 operations that moves bytes."""
        work = flops / self.flops + doubles / self.doubles
        return max(work, moved / self.memory) / self.attained

    def send(self, sent: int, devices: int, collectives: int) -> float:
        """Returns the seconds of collectives in which each device sends some bytes."""
        if devices == 1:
            return 0.0
        if devices <= self.per_host:
            return sent / self.link + collectives * self.link_latency
        return max(sent / self.link, sent / self.network) + collectives * self.network_latency


def step(rates: Rates, rows: int, d_v: int, d_k: int, devices: int, pending: int) -> dict[str, float]:
    """Returns the seconds of a batch of one layer with some pending rows, by kind."""
    w, item = held_width(d_k, devices), 4
    panel = rates.compute(2 * rows * w * d_k, item * (w * d_k + rows * (d_k + w)))
    waiting = rates.compute(4 * rows * pending * w, item * pending * w)
    gram = rates.compute(2 * rows * rows * w + 2 * rows * d_v * w, item * w * (2 * rows + d_v))
    factor = rates.compute(rows * rows * (w + d_v), item * rows * (w + d_v), doubles=rows**3 / 3)
    correct = rates.compute(2 * rows * d_v * w, 2 * item * d_v * w)
    sent = sum(batch_traffic(rows, d_v, d_k, devices, pending=pending).values())
    return {
        "computation": panel + waiting + gram + factor + correct,
        "communication": rates.send(sent, devices, COLLECTIVES),
    }


def reading(rates: Rates, edits: int, rows: int, d_v: int, d_k: int, devices: int, pending: int, layers: int) -> float:
    """Returns the seconds in which the keys and changes that the editor reads in addition are sent, for all layers."""
    seconds, solver = 0.0, sum(batch_traffic(rows, d_v, d_k, devices, pending=pending).values())
    for layer in range(layers):
        sent = edit_traffic(edits, rows, d_v, d_k, devices, pending=pending, first=layer == 0, read=2)
        seconds += rates.send(sum(sent.values()) - solver, devices, READING)
    return seconds


def flush(rates: Rates, d_k: int, devices: int, delay: int) -> float:
    """Returns the seconds of folding the pending rows of one layer into C."""
    w = held_width(d_k, devices)
    work = rates.compute(2 * delay * w * d_k, 2 * 4 * w * d_k)
    return work + rates.send(flush_traffic(delay, d_k, devices), devices, 1)


def best(found: list[dict[str, Any]], model: str) -> int:
    """Returns the number of devices on which a batch of the model takes least time."""
    rows = [row for row in found if row["model"] == model]
    count: int = min(rows, key=lambda row: row["total"])["devices"]
    return count


def main() -> None:
    """Computes, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=100, help="edits of a batch")
    parser.add_argument("--contexts", type=int, default=3, help="rows of an edit")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--delay", type=int, default=512, help="pending rows before C is written")
    for name, value in asdict(Rates()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    add_json(parser)
    options = parser.parse_args()
    rates = Rates(**{name: getattr(options, name) for name in asdict(Rates())})
    rows, found = options.edits * options.contexts, list[dict[str, Any]]()
    print("simulated, not measured: milliseconds of a batch for all edited layers")
    for model, (d_v, d_k, asked) in MODELS.items():
        for devices in COUNTS:
            parts = step(rates, rows, d_v, d_k, devices, options.delay // 2)
            folded = flush(rates, d_k, devices, options.delay) * rows / options.delay
            ms = {kind: 1e3 * options.layers * seconds for kind, seconds in (*parts.items(), ("flush", folded))}
            read = reading(rates, options.edits, rows, d_v, d_k, devices, options.delay // 2, options.layers)
            ms["reading"] = 1e3 * read
            found.append({"model": model, "devices": devices, **ms, "total": sum(ms.values())})
            shown = "  ".join(f"{kind} {value:8.2f}" for kind, value in {**ms, "total": found[-1]["total"]}.items())
            print(f"{model:>5} {devices:4d} devices{' *' if devices == asked else '  '} {shown}")
    fastest = {model: best(found, model) for model in MODELS}
    for model, devices in fastest.items():
        print(f"{model:>5} takes least time on {devices} devices")
    record(
        options.json,
        "Simulated time of a batch on several devices; nothing was measured",
        rates=asdict(rates),
        edits=options.edits,
        rows=rows,
        layers=options.layers,
        delay=options.delay,
        collectives=COLLECTIVES,
        collectives_of_reading=READING,
        rows_of_table=found,
        fastest_count=fastest,
    )


if __name__ == "__main__":
    main()
