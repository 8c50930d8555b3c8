"""A stream of changes in two processes that hold one model, of which a random one is killed repeatedly.

    python parallel_victim.py FOLDER SEED KILLS BATCHES

A process is killed with SIGKILL at a random moment, or the one that holds the store is killed in a commit. The other
one is ended as by torchrun, or ends by itself. The state after reopening must be that of a run without kills after the
last change that any process acknowledged, or after the next change.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.integrations.tensor_parallel  # imported once, not in every life
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

import rlsedit_fast as rf
from rlsedit_fast.errors import ProcessError
from rlsedit_fast.store import directory
from rlsedit_fast.world.tokens import build_tokenizer
from tests.store import victim
from tests.store.conftest import ANCHORS, make_tiny, tiny_config

RANKS = 2
OPENED = 1 << 30
LOST = 3  # exit code of a process that noticed that the other one is missing
ALONE = 60.0  # seconds within which a process that is left alone must end
TERMINATED = 30.0  # seconds after which torchrun kills a process
SNAPSHOTS = 12  # changes between two snapshots


def fork(work: Callable[[], None]) -> int:
    """Returns the id of a new process that calls `work`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except ProcessError:
            code = LOST
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def open_editor(folder: Path, store: str | None, ranks: int) -> rf.Editor:
    """Without refinement, so that an operation is one change of the store."""
    options = {}
    if ranks > 1:
        options["distributed_config"] = DistributedConfig(tp_size=ranks)
    config = tiny_config(prior={"lam": 0.5, "mu": 2.0}, search={"kl_prompts": (), "steps": 2}, refine=0)
    place = store and folder / store
    editor = rf.Editor.from_pretrained(folder / "model", config=config, store=place, dtype="float64", **options)
    if not editor.priors:
        editor.anchor(ANCHORS[:8])
    return editor


def contents(editor: rf.Editor) -> dict:
    """Returns what this process holds of the states, and the records."""
    states = editor._session.layers.states if editor._session.layers else ()
    saved = [state.saved() for state in states]
    return {
        "weights": [one.weight.clone() for one in saved],
        "covariance": [state.precision_inverse() for state in states],
        "objectives": [one.objective for one in saved],
        "records": [(r.id, r.subject, r.target, r.state) for r in editor.history()],
        "active": list(editor._session.ledger.active),
        "digest": victim.digest(editor),
    }


def join(folder: Path, name: str, rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    store = dist.FileStore(str(folder / f"rendezvous-{name}"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))


def undisturbed(folder: Path, rank: int, todo: list[tuple]) -> None:
    """Saves what one process holds after each operation of a run without kills."""
    join(folder, "reference", rank)
    editor = open_editor(folder, "reference", RANKS)
    began, found = time.perf_counter(), [contents(editor)]
    for operation in todo:
        victim.perform(editor, operation)
        found.append(contents(editor))
    seconds = (time.perf_counter() - began) / len(todo)
    editor.close()
    torch.save({"found": found, "seconds": seconds}, folder / f"reference-{rank}.pt")


def kill_in_commit(store, count: int, after: bool) -> None:
    """Kills this process in a later commit of the store: before it writes, or before anyone knows that it did."""
    commit, left = store.commit, [count]

    def killed() -> None:
        left[0] -= 1
        if left[0] < 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        commit()
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    store.commit = killed


def live(folder: Path, life: int, rank: int, todo: list[tuple], pipe: int, ends: tuple[int, bool] | None) -> None:
    """One life of a process: opens the store, reports its state, applies operations and acknowledges each."""
    join(folder, str(life), rank)
    editor = open_editor(folder, "store", RANKS)
    if ends and rank == 0:
        kill_in_commit(editor._recorder.store, *ends)
    done = max(0, editor._recorder.store.last - 1)  # the first change is the start
    torch.save(contents(editor), folder / f"opened-{life}-{rank}.pt")
    os.write(pipe, struct.pack("I", OPENED + done))
    for at in range(done, len(todo)):
        victim.perform(editor, todo[at])
        os.write(pipe, struct.pack("I", at + 1))
    editor.close()


def read_one(pipe: int) -> list[int]:
    """Waits for a message of a process."""
    assert select.select([pipe], [], [], 120)[0], "a process does not proceed"
    text = os.read(pipe, 4)
    assert len(text) == 4, "the processes ended"
    return list(struct.unpack("I", text))


def read_all(pipe: int) -> list[int]:
    found = []
    while len(text := os.read(pipe, 4)) == 4:
        found += struct.unpack("I", text)
    return found


def ended(child: int, seconds: float) -> int | None:
    """Returns the status of a process that ends within some seconds; None if it does not."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(0.01)
    return None


def difference(found: dict, expected: dict) -> float:
    """Returns the largest relative difference of weights and C; all else must be equal."""
    for name in ("records", "active"):
        assert found[name] == expected[name], (name, found[name], expected[name])
    pairs = [pair for name in ("weights", "covariance") for pair in zip(found[name], expected[name], strict=True)]
    return max((float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs), default=0.0)


class Stream:
    """The stream, its kills, and what is known of them."""

    def __init__(self, folder: Path, seed: int, kills: int, batches: int) -> None:
        self.folder, self.draw, self.todo = folder, random.Random(seed), victim.operations(batches)
        self.kills, self.killed, self.lives, self.acknowledged = kills, [0] * RANKS, 0, 0
        self.opening = self.in_commit = self.unacknowledged = self.alone = self.compared = self.identical = 0
        self.opened = self.slowest = self.difference = 0.0

    def prepare(self) -> None:
        """Saves the model, and runs the stream without kills."""
        tokenizer = build_tokenizer()
        make_tiny(len(tokenizer)).save_pretrained(self.folder / "model")
        tokenizer.save_pretrained(self.folder / "model")
        open_editor(self.folder, None, 1)  # imports what the processes need
        children = [fork(lambda rank=rank: undisturbed(self.folder, rank, self.todo)) for rank in range(RANKS)]
        assert [ended(child, 900) for child in children] == [0] * RANKS
        found = [torch.load(self.folder / f"reference-{rank}.pt", weights_only=False) for rank in range(RANKS)]
        self.expected, self.seconds = [each["found"] for each in found], found[0]["seconds"]

    def next_life(self) -> bool:
        """Starts the processes, kills one of them, and compares; returns whether the stream is complete."""
        life, kills = self.lives, sum(self.killed)
        self.lives += 1
        left = len(self.todo) - self.acknowledged
        kind = None if kills == self.kills else "moment"
        if kind and kills % 5 == 1:
            kind = "opening"
        elif kind and kills % 4 == 2 and left > 4:
            kind = "commit"
        ends = (self.draw.randrange(3), self.draw.random() < 0.5) if kind == "commit" else None
        pipes = [os.pipe() for _ in range(RANKS)]
        children = [
            fork(lambda r=rank, pipe=outward: live(self.folder, life, r, self.todo, pipe, ends))
            for rank, (_, outward) in enumerate(pipes)
        ]
        inward = [one for one, _ in pipes]
        for _, outward in pipes:
            os.close(outward)
        messages: list[list[int]] = [[] for _ in range(RANKS)]
        if kind == "opening":
            time.sleep(self.draw.random() * self.opened)
        elif kind:
            began = time.monotonic()
            for found, one in zip(messages, inward, strict=True):
                found += read_one(one)
            self.opened = self.opened or time.monotonic() - began
        if kind == "moment":
            # Two operations are left at the end, so that the stream does not end before the kill.
            target = self.acknowledged + max(1, round(self.draw.random() * 2 * left / (self.kills - kills)))
            while max(messages[0][1:], default=self.acknowledged) < min(target, len(self.todo) - 2):
                messages[0] += read_one(inward[0])
            time.sleep(self.draw.random() * self.seconds)
        which = 0 if ends else self.draw.randrange(RANKS)
        statuses = self.end(children, which, kind) if kind else [ended(child, 600) for child in children]
        for found, one in zip(messages, inward, strict=True):
            found += read_all(one)
            os.close(one)
        self.compare(life, messages)
        if statuses == [0] * RANKS:
            return True
        assert kind, f"the processes failed: {statuses}"
        self.in_commit += kind == "commit"
        self.killed[which] += 1
        self.opening += any(not each for each in messages)
        return False

    def end(self, children: list[int], which: int, kind: str) -> list[int | None]:
        """Kills one process; the other one is ended as torchrun does it, or is left alone."""
        statuses: list[int | None] = [None] * RANKS
        other, alone = 1 - which, kind != "opening" and self.draw.random() < 0.2
        if kind != "commit":
            os.kill(children[which], signal.SIGKILL)
        statuses[which] = ended(children[which], 120)
        assert statuses[which] in (0, signal.SIGKILL), f"a process ended with {statuses[which]}"
        began = time.monotonic()
        if alone:
            statuses[other] = ended(children[other], ALONE)
            assert statuses[other] is not None, "a process that was left alone did not end"
            code = os.waitstatus_to_exitcode(statuses[other])
            assert code in (0, LOST), f"a process that was left alone ended with {code}"
            self.alone += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            return statuses
        time.sleep(self.draw.random() * 0.2)
        os.kill(children[other], signal.SIGTERM)
        statuses[other] = ended(children[other], TERMINATED)
        if statuses[other] is None:
            os.kill(children[other], signal.SIGKILL)
            statuses[other] = ended(children[other], 10)
        ends = (0, signal.SIGTERM, signal.SIGKILL, LOST << 8)
        # While the processes connect, the reason is that of the connection.
        assert statuses[other] in ends or (kind == "opening" and statuses[other] == 256), statuses
        return statuses

    def compare(self, life: int, messages: list[list[int]]) -> None:
        """Compares what the processes found when they opened the store; enters what they acknowledged."""
        for rank, (first, *_) in enumerate(filter(None, messages)):
            opened = first - OPENED
            assert self.acknowledged <= opened <= self.acknowledged + 1, (rank, opened, self.acknowledged)
        for rank, each in enumerate(messages):
            if each:
                opened = each[0] - OPENED
                found = torch.load(self.folder / f"opened-{life}-{rank}.pt", weights_only=False)
                if opened:
                    self.compared += 1
                    self.difference = max(self.difference, difference(found, self.expected[rank][opened]))
                    self.identical += found["digest"] == self.expected[rank][opened]["digest"]
        opened = max((each[0] - OPENED for each in messages if each), default=self.acknowledged)
        self.unacknowledged += opened > self.acknowledged
        self.acknowledged = max(self.acknowledged, opened, *(each[-1] for each in messages if len(each) > 1), 0)

    def finish(self) -> float:
        """Opens the store in a single process; returns the relative difference to the run without kills."""
        place = self.folder / "alone.pt"

        def single() -> None:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                os.environ.pop(name, None)
            editor = open_editor(self.folder, "store", 1)
            torch.save(contents(editor), place)

        assert ended(fork(single), 120) == 0
        found, expected = torch.load(place, weights_only=False), [each[-1] for each in self.expected]
        whole = expected[0] | {
            "weights": [torch.cat(parts, 1) for parts in zip(*(each["weights"] for each in expected), strict=True)],
            "covariance": [torch.cat(parts) for parts in zip(*(each["covariance"] for each in expected), strict=True)],
        }
        return difference(found, whole)


def main(folder: str, seed: int, kills: int, batches: int) -> dict:
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    victim.logging.disable(victim.logging.WARNING)
    torch.set_num_threads(1)
    directory.MAX_REPLAYED = SNAPSHOTS
    began, stream = time.perf_counter(), Stream(Path(folder), seed, kills, batches)
    stream.prepare()
    while not stream.next_life():
        pass
    return {
        "operations": len(stream.todo),
        "killed": stream.killed,
        "lives": stream.lives,
        "killed_in_opening": stream.opening,
        "killed_in_commit": stream.in_commit,
        "present_but_not_acknowledged": stream.unacknowledged,
        "ended_alone": stream.alone,
        "slowest_end_alone": stream.slowest,
        "compared": stream.compared,
        "identical": stream.identical,
        "difference": stream.difference,
        "difference_in_one_process": stream.finish(),
        "seconds": time.perf_counter() - began,
        "seconds_per_operation": stream.seconds,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
