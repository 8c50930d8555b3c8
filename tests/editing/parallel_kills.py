"""A stream in two processes, of which one is killed repeatedly: `parallel_kills.py FOLDER KILLS SEED`.

FOLDER contains a model, `llama`. The processes divide it, and the first one keeps the store. At a random moment one of
them gets SIGKILL; if both had joined, the other one must end by itself. The store must then hold the changes that were
acknowledged, possibly the next one, and no part of another. Afterwards the stream ends without kills; an undisturbed
stream of the same changes must give the same weights. The last line of the output is a summary in JSON.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import rlsedit_fast as rf
from rlsedit_fast import processes
from rlsedit_fast.editing.storage.recovery import read_history
from rlsedit_fast.store import Store

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.editing.parallel_worker import config_of, edits, options  # noqa: E402

RANKS, SIZE = 2, 2
SETTINGS = {"prior": {"lam": 0.3}, "delay": 8, "batch_size": SIZE}
PATIENCE = 60.0  # seconds after which a process that lost the other one must have ended
SPAN = 1.2  # seconds; the last moment of a kill after the start of a process or its first change


def undone(change: int) -> int | None:
    """Returns the id that a change undoes: every third change undoes an edit of the two before; others add edits."""
    return change // 3 * 2 * SIZE + 1 if change % 3 == 2 else None


def expected(changes: int) -> list[tuple[int, str]]:
    """Returns ids and states of the edits after the first changes."""
    states: dict[int, str] = {}
    for change in range(changes):
        if (which := undone(change)) is not None:
            states[which] = "undone"
        else:
            states |= {len(states) + at: "active" for at in range(1, SIZE + 1)}
    return sorted(states.items())


def present(store: Path) -> int | None:
    """Returns the number of changes that a store holds; None if it holds a part of a change."""
    found = [(record.id, record.state) for record in read_history(store)] if Store.exists(store) else []
    first = len(found) // SIZE
    return next((n for n in range(first, 2 * first + 2) if expected(n) == found), None)


def run(rank: int, folder: Path, store: Path, name: str, last: int | None) -> None:
    """Continues the stream, to its end if `last` is given."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    processes.PATIENCE = 1.0
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ["RANK"] = str(rank)
    place = dist.FileStore(str(folder / f"rendezvous-{name}"), RANKS)
    dist.init_process_group("gloo", store=place, rank=rank, world_size=RANKS)
    (folder / f"joined-{name}-{rank}").touch()
    model, given = folder / "llama", {"store": store, "dtype": "float32", **options(RANKS)}
    config = None if Store.exists(store) else config_of(SETTINGS)
    with rf.Editor.from_pretrained(model, config=config, **given) as editor:
        change = present(store) or 0
        dist.barrier()
        while last is None or change < last:
            if (which := undone(change)) is not None:
                editor.undo(which)
            else:
                start = sum(undone(before) is None for before in range(change)) * SIZE
                editor.edit(edits(start, SIZE))
            change += 1
            if rank == 0:
                (folder / f"acknowledged-{name}").write_text(str(change))
        weights = [change.current for change in editor.changes()]
        if rank == 0:
            torch.save(weights, folder / f"weights-{name}.pt")
    os._exit(0)


def attempt(folder: Path, store: Path, name: str, last: int | None, draw: random.Random) -> dict[str, int]:
    """Starts the processes, and kills one if `last` is None; returns what happened."""
    context = multiprocessing.get_context("fork")  # torch and transformers are imported once
    started = [context.Process(target=run, args=(rank, folder, store, name, last)) for rank in range(RANKS)]
    for process in started:
        process.start()
    acknowledged = folder / f"acknowledged-{name}"
    happened = {"killed": 0, "killed_first": 0, "killed_in_opening": 0}
    if last is None:
        wait = draw.random() < 0.8
        while wait and not acknowledged.exists() and all(process.is_alive() for process in started):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, SPAN))
        victim = draw.randrange(RANKS)
        happened = {"killed": 1, "killed_first": victim == 0, "killed_in_opening": not acknowledged.exists()}
        os.kill(started[victim].pid or 0, signal.SIGKILL)
        if not all((folder / f"joined-{name}-{rank}").exists() for rank in range(RANKS)):
            started[1 - victim].kill()  # as torchrun does; it waits for the other one until the timeout of PyTorch
    end = time.monotonic() + (PATIENCE if last is None else 600)
    for process in started:
        process.join(max(0.0, end - time.monotonic()))
    stuck = [process for process in started if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    assert not stuck, f"{name}: {len(stuck)} processes did not end by themselves"
    assert last is None or not any(process.exitcode for process in started)
    return happened


def main(folder: Path, kills: int, seed: int) -> dict[str, float]:
    draw, store, total = random.Random(seed), folder / "store", dict[str, float]()
    known = 0
    for at in range(kills):
        happened = attempt(folder, store, str(at), None, draw)
        file = folder / f"acknowledged-{at}"
        known = max(known, int(file.read_text() or 0) if file.exists() else 0)
        found = present(store)
        assert found is not None, f"kill {at}: a part of a change is in the store: {read_history(store)}"
        assert known <= found <= known + 1, f"kill {at}: {known} changes were acknowledged, and {found} are there"
        happened["present_but_not_acknowledged"] = found > known
        known = found
        for key, count in happened.items():
            total[key] = total.get(key, 0) + count
    attempt(folder, store, "end", known + 2, draw)
    attempt(folder, folder / "undisturbed", "undisturbed", known + 2, draw)
    ours, theirs = (torch.load(folder / f"weights-{name}.pt") for name in ("end", "undisturbed"))
    error = max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(ours, theirs, strict=True))
    return total | {"changes": known + 2, "error": error}


if __name__ == "__main__":
    place, count, chosen = sys.argv[1:]
    print(json.dumps(main(Path(place), int(count), int(chosen))))
