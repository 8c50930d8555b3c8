"""Timing of contenders in turn, so that whatever else the machine does falls on all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

WARM_UP = 2  # the first calls wake the threads and touch the memory


def medians(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each; a buffer larger than the last cache is written before every call."""
    flush = torch.empty(32 << 20)  # 128 MiB
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + WARM_UP):
        for name, run in contenders.items():
            time.sleep(0.1)  # threads of another library's pool spin on for a while, and would be in this one's way
            flush.fill_(repeat)
            began = time.perf_counter()
            run()
            if repeat >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}
