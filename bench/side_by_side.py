"""Timing of alternating contenders, so that other load on the machine affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 2  # the first calls start threads and touch memory


def medians(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns median milliseconds of each; a buffer larger than the last-level cache is written before every call."""
    flush = torch.empty(32 << 20)  # 128 MiB
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + WARM_UP):
        for name, run in contenders.items():
            time.sleep(0.1)  # wait for spinning threads of other thread pools
            flush.fill_(repeat)
            began = time.perf_counter()
            run()
            if repeat >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}
