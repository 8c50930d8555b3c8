"""A process that exits at chosen lines of the code that writes a store.

    python lines.py FOLDER POINTS

For each kind of change, a child process exits at POINTS random lines (0: at every line) of those that are executed. The
store must then equal its state before or after the change. A batch with refinement consists of three changes: the
batch, the refinement of its edits, and the refinement of earlier edits.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from rlsedit_fast.editing import refinement
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.store import directory
from rlsedit_fast.world.tokens import build_tokenizer
from tests.store.conftest import make_tiny
from tests.store.victim import digest, make_editor, perform, values_by_name

CHANGES = {
    "first": [("edit", 0)],
    "edit": [("edit", 0), ("edit", 1)],
    "snapshot": [("edit", 0), ("edit", 1), ("undo", [2]), ("edit", 2), ("edit", 3), ("edit", 4), ("edit", 5)],
    "refine": [("edit", 0), ("edit", 1)],
    "undo": [("edit", 0), ("edit", 1), ("edit", 2), ("undo", [1, 4])],
    "protect": [("edit", 0), ("protect", 1)],
    "consolidate": [("edit", 0), ("edit", 1), ("undo", [3]), ("edit", 2), ("consolidate",)],
    "open": [("edit", 0), ("edit", 1), ("undo", [2]), ("edit", 2), ("nothing",)],
}
WATCHED = ("/store/", "/persistence.py", "/editor.py")


def ended_at(
    line: int, model, tokenizer, store: Path, operation: tuple, refine: int, *, earlier: bool = True
) -> tuple[bool, int]:
    """Applies a change in a child that exits at line number `line`; returns if it completed, and the line count."""
    inward, outward = os.pipe()
    child = os.fork()
    if child == 0:
        executed = 0

        def on_line(_frame, event, _argument):
            nonlocal executed
            if event == "line":
                executed += 1
                if executed == line:
                    os._exit(9)
            return on_line

        def on_call(frame, _event, _argument):
            name = frame.f_code.co_filename
            return on_line if "rlsedit_fast" in name and any(part in name for part in WATCHED) else None

        try:
            if operation[0] == "nothing":
                sys.settrace(on_call)
                make_editor(model, tokenizer, store)
            else:
                editor = make_editor(model, tokenizer, store, refine=refine)
                if not earlier:
                    refinement.Refiner.earlier_ids = lambda *_: []
                sys.settrace(on_call)
                perform(editor, operation)
            sys.settrace(None)
            os.write(outward, executed.to_bytes(4, "big"))
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(outward)
    _, status = os.waitpid(child, 0)
    text = os.read(inward, 4)
    os.close(inward)
    assert os.WEXITSTATUS(status) in (0, 9), status
    return os.WEXITSTATUS(status) == 0, int.from_bytes(text, "big")


def state_of(model_of, tokenizer, store: Path) -> bytes:
    with make_editor(model_of(), tokenizer, store) as editor:
        return digest(editor)


def main(folder: Path, points: int) -> dict[str, int]:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    value_search.search_within_memory = values_by_name
    refinement._is_better = lambda *_: True  # accept every refinement, since values are random
    directory.MAX_REPLAYED = 6
    draw, tokenizer = random.Random(1), build_tokenizer()
    model = make_tiny(len(tokenizer))

    def fresh():
        return make_tiny(len(tokenizer))

    counts = {"ended": 0, "present": 0, "absent": 0}
    for kind, operations in CHANGES.items():
        base, work = folder / f"{kind}.base", folder / f"{kind}.work"
        with make_editor(fresh(), tokenizer, base) as editor:
            for operation in operations[:-1]:
                perform(editor, operation)
            before = digest(editor)
        shutil.copytree(base, work)
        refine, between = int(kind == "refine"), set()
        for rounds, earlier in ((0, False), (1, False)) if refine else ():
            ended_at(0, model, tokenizer, work, operations[-1], rounds, earlier=earlier)
            between.add(state_of(fresh, tokenizer, work))
            shutil.rmtree(work)
            shutil.copytree(base, work)
        whole, lines = ended_at(0, model, tokenizer, work, operations[-1], refine)
        assert whole
        after = state_of(fresh, tokenizer, work)
        assert (after == before) == (kind == "open")
        assert len({before, after, *between}) == (4 if kind == "refine" else 1 if kind == "open" else 2)
        for line in sorted(draw.sample(range(1, lines + 1), points)) if points else range(1, lines + 1):
            shutil.rmtree(work)
            shutil.copytree(base, work)
            whole, _ = ended_at(line, model, tokenizer, work, operations[-1], refine)
            assert not whole
            found = state_of(fresh, tokenizer, work)
            assert found in {before, after, *between}, f"{kind}, line {line} of {lines}"
            counts["ended"] += 1
            counts["present" if found == after else "absent"] += 1
            # The change can be applied again.
            if found == before and kind != "open":
                with make_editor(fresh(), tokenizer, work, refine=refine) as editor:
                    perform(editor, operations[-1])
                    assert digest(editor) == after
    return counts


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
