"""One of two processes of a stream, each on its own host: `host_worker.py FOLDER NAME RANK TIMEOUT [LAST]`.

The collectives time out after TIMEOUT seconds. The stream ends after LAST edits if that is given. The first process
writes the number of edits into FOLDER/acknowledged-NAME after each call. Each one writes how it ended into
FOLDER/ended-NAME-RANK.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import rlsedit_fast as rf

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.editing.parallel_worker import config_of, edits, options

RANKS, SIZE = 2, 2
SETTINGS = {"prior": {"lam": 0.3}, "delay": 8, "batch_size": SIZE}


def stream(folder: Path, name: str, rank: int, last: int | None) -> None:
    store = folder / "store"
    config = None if store.exists() else config_of(SETTINGS)
    given = {"store": store, "dtype": "float32", **options(RANKS)}
    dist.barrier()
    with rf.Editor.from_pretrained(folder / "llama", config=config, **given) as editor:
        while last is None or len(editor.history()) < last:
            editor.edit(edits(len(editor.history()), SIZE))
            if rank == 0:
                with (folder / f"acknowledged-{name}").open("a") as file:
                    print(len(editor.history()), file=file, flush=True)


def main(folder: str, name: str, rank: str, seconds: str, last: str | None = None) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    os.environ |= {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": str(RANKS)}
    place, ended = Path(folder), "complete"
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=int(seconds)))
        stream(place, name, int(rank), int(last) if last else None)
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"
    (place / f"ended-{name}-{rank}").write_text(ended)
    os._exit(ended != "complete")  # the destructors of a lost group wait


if __name__ == "__main__":
    main(*sys.argv[1:])
