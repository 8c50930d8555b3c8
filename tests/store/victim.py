"""A stream of changes whose process is killed repeatedly and resumes from its store every time.

    python victim.py STORE SEED KILLS BATCHES

A forked child is killed with SIGKILL at a random moment. The state after reopening must equal, bit for bit, that of a
run without kills after the last change that the child acknowledged, or after the next change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import select
import signal
import struct
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import rlsedit_fast as rf
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.editing.search.value_search import Values
from rlsedit_fast.store import directory
from rlsedit_fast.world.tokens import build_tokenizer
from tests.store.conftest import ANCHORS, make_edits, make_tiny, tiny_config

SIZE = 2  # edits per batch
OPENED, DONE = 1 << 30, (1 << 30) + 1


def values_by_name(site, requests, config, groups, at_once):
    """Replaces the slow value search by values that depend only on the texts."""
    deltas = []
    for request in requests:
        seed = int.from_bytes(
            hashlib.sha256(f"{request.prompt_key} {request.edit.target}".encode()).digest()[:6], "big"
        )
        deltas.append(torch.randn(16, generator=torch.Generator().manual_seed(seed)))
    delta, count = torch.stack(deltas), len(requests)
    done = torch.ones(count, dtype=torch.bool)
    found = Values(
        delta, torch.zeros_like(delta)[:, None], torch.zeros(count), torch.ones(count).long(), done, torch.ones(count)
    )
    return found, at_once


def operations(batches: int) -> list[tuple]:
    """Returns operations: mostly edits, with some undos, replacements, protections and consolidations."""
    made, active, draw = [], [], random.Random(11)
    identity = 0
    for batch in range(batches):
        made.append(("edit", batch))
        active += [identity + 1, identity + 2]
        identity += 2
        if batch % 7 == 6:
            undone = sorted(draw.sample(active, 3))
            made.append(("undo", undone))
            active = [i for i in active if i not in undone]
        if batch % 31 == 30:
            old = draw.choice(active)
            made.append(("replace", old))
            active = [i for i in active if i != old] + [identity + 1]
            identity += 1
        if batch % 60 == 20:
            made.append(("protect", batch))
        if batch % 50 == 49:
            made.append(("consolidate",))
    return made


def perform(editor: rf.Editor, operation: tuple) -> None:
    kind, *rest = operation
    if kind == "edit":
        editor.edit(make_edits(SIZE, start=SIZE * rest[0]))
    elif kind == "undo":
        editor.undo(rest[0])
    elif kind == "replace":
        editor.replace(rest[0], target="Lake Garnet")
    elif kind == "protect":
        editor.protect([f"Veta speaks Kubeish {'.' * (rest[0] % 5 + 1)}"])
    else:
        editor.consolidate()


def make_editor(model, tokenizer, store=None, *, refine: int = 0) -> rf.Editor:
    """By default without refinement, so that an operation is one change of the store."""
    config = tiny_config(prior={"lam": 0.5, "mu": 2.0}, search={"kl_prompts": ()}, refine=refine)
    editor = rf.Editor(model, tokenizer, config=config, store=store)
    if not editor.priors:
        editor.anchor(ANCHORS)
    return editor


def digest(editor: rf.Editor) -> bytes:
    found = hashlib.sha256()
    for state in editor._session.layers.states if editor._session.layers else ():
        saved = state.saved()
        for tensor in (saved.weight, saved.base, saved.pending, saved.signs, saved.image):
            found.update(tensor.contiguous().numpy().tobytes())
        found.update(repr((saved.objective, saved.edits)).encode())
    found.update(repr([(r.id, r.subject, r.target, r.state, r.realized) for r in editor.history()]).encode())
    return found.digest()[:16]


def live(model, tokenizer, store: str, todo: list[tuple], pipe: int) -> None:
    """One life: opens the store, reports its state, applies operations and acknowledges each."""
    editor = make_editor(model, tokenizer, store)
    done = max(0, editor._recorder.store.last - 1)  # the first change is the start
    os.write(pipe, struct.pack("I16s", OPENED + 2 + done, digest(editor)))
    for at in range(done, len(todo)):
        perform(editor, todo[at])
        os.write(pipe, struct.pack("I16s", at + 1, b""))
    editor.close()
    os.write(pipe, struct.pack("I16s", DONE, b""))


def messages(pipe: int):
    while len(text := os.read(pipe, 20)) == 20:
        yield struct.unpack("I16s", text)


def main(store: str, seed: int, kills: int, batches: int) -> dict:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    value_search.search_within_memory = values_by_name
    directory.MAX_REPLAYED = 25
    draw, tokenizer = random.Random(seed), build_tokenizer()
    todo, model = operations(batches), make_tiny(len(tokenizer))
    began = time.perf_counter()
    reference = make_editor(make_tiny(len(tokenizer)), tokenizer)
    digests = [digest(reference)]
    for operation in todo:
        perform(reference, operation)
        digests.append(digest(reference))
    step = (time.perf_counter() - began) / len(todo)
    acknowledged, killed, lives, in_opening, unacknowledged = 0, 0, 0, 0, 0
    finished = False
    while not finished:
        inward, outward = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(inward)
            try:
                live(model, tokenizer, store, todo, outward)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        os.close(outward)
        lives += 1
        opened, found = None, []
        if killed < kills:
            if killed % 7 == 3:  # in the opening, whatever the speed of the machine
                time.sleep(draw.random() * step if in_opening else 0)
            else:
                select.select([inward], [], [], 60)
                left = (len(todo) - acknowledged) / (kills - killed)
                time.sleep(draw.random() * 2 * left * step)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        for what, text in messages(inward):
            if what == DONE:
                finished = True
            elif what > OPENED:
                opened = what - OPENED - 2
                assert acknowledged <= opened <= acknowledged + 1, (acknowledged, opened)
                assert text == digests[opened], f"the state after {opened} operations differs"
                unacknowledged += opened > acknowledged
                acknowledged = opened
            else:
                found.append(what)
                acknowledged = what
        os.close(inward)
        if os.WIFSIGNALED(status):
            killed += 1
            in_opening += opened is None
        else:
            assert os.WEXITSTATUS(status) == 0, "a child failed"
            finished = True
    with rf.Editor(make_tiny(len(tokenizer)), tokenizer, store=store) as editor:
        assert digest(editor) == digests[-1]
    return {
        "operations": len(todo),
        "killed": killed,
        "lives": lives,
        "killed_in_opening": in_opening,
        "present_but_not_acknowledged": unacknowledged,
        "seconds": time.perf_counter() - began,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
