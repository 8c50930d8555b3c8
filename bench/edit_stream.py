"""End-to-end time of a stream of edits by part, and whether the time per batch stays constant.

Subjects are random distinct names, so that streams can have any length; the cost of an edit does not depend on whether
the model knows the subject.

    python bench/edit_stream.py --json bench/results/edit-stream-cpu.json
    python bench/edit_stream.py --model llama-3-8b --device cuda --json FILE

The time of every batch is split into `values` (value search), `keys` (forward passes that read keys), `solve` (panel,
factor, flush), `write` (weight update), `measure` (rank, realized change, and answers before and after), `store` (not
used, see store.py) and `other`. On CUDA every part is synchronized. `flat` is the median batch time of the last tenth
of the stream divided by that of the first tenth, by part.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import torch
from random_models import SHAPES, random_llama
from recording import add_json, record
from tqdm import tqdm

from rlsedit_fast import Edit, EditConfig, Editor
from rlsedit_fast.editing import layers, measurement
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.ops import dispatch
from rlsedit_fast.rls.state import RLSState
from rlsedit_fast.world import RELATIONS, World, load_demo_model
from rlsedit_fast.world.tokens import build_tokenizer

SEED = 0
PARTS = ("values", "keys", "solve", "write", "measure", "store", "other")
WATCHED = (
    (value_search, "search_within_memory", "values"),
    (layers, "request_keys", "keys"),
    (RLSState, "project", "solve"),
    (RLSState, "update_projected", "solve"),
    (RLSState, "replace", "solve"),
    (RLSState, "outputs", "solve"),
    (layers, "amplify_innovation", "solve"),
    (layers, "amplify_values", "solve"),
    (measurement, "measure", "measure"),
    (measurement, "answer_facts", "measure"),
)
DEEP = EditConfig(layers=(4, 5, 6, 7, 8), search={"steps": 25})
"""Settings of the random models: five layers, default contexts, KL prompt and stopping rule."""


class Split:
    """Seconds by part; nested parts are not counted in the outer part."""

    def __init__(self, device: str) -> None:
        self._wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
        self._open: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = defaultdict(float)

    def enter(self, part: str) -> None:
        """Starts a part."""
        self._switch()
        self._open.append(part)

    def leave(self) -> None:
        """Ends the current part and continues the outer one."""
        self._switch()
        self._open.pop()

    def watched(self, owner: Any, name: str, part: str) -> AbstractContextManager[Any]:
        """Counts calls of a function as a part while the context is active."""
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return real(*args, **kwargs)
            finally:
                self.leave()

        return mock.patch.object(owner, name, timed)

    def _switch(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def stream(count: int) -> list[Edit]:
    """Returns `count` edits of different subjects."""
    world = World.generate()
    words = [sorted({person.name.split()[at] for person in world.people}) for at in range(3)]
    draw = random.Random(SEED)
    names: dict[str, None] = {}
    while len(names) < count:
        names[" ".join(draw.choice(column) for column in words)] = None
    edits = []
    for name in names:
        relation = draw.choice(RELATIONS)
        edits.append(Edit(draw.choice(relation.phrasings), name, draw.choice(relation.values)))
    return edits


def make_model(options: argparse.Namespace) -> tuple[Any, Any, EditConfig]:
    """Returns model, tokenizer and settings."""
    if options.model == "demo":
        model, tokenizer = load_demo_model()
        return model.to(options.device), tokenizer, CONFIG.replace(batch_size=options.batch_size)
    config = DEEP.replace(batch_size=options.batch_size, search={"memory": options.search_memory})
    if options.model == "random":
        config = config.replace(layers=(1, 2, 3))
    return random_llama(options.model, options.device), build_tokenizer(), config


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cuda = torch.device(options.device).type == "cuda"
    if options.memory_cap:
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(options.memory_cap / whole)
    if options.no_cudnn_attention:
        torch.backends.cuda.enable_cudnn_sdp(False)
    model, tokenizer, config = make_model(options)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model_bytes = torch.cuda.memory_allocated() if cuda else None
    editor = Editor(model, tokenizer, config=config)
    editor.anchor(anchor_texts(World.generate(), SEED))
    edits = stream(options.edits)
    split = Split(options.device)
    rows, before = [], dict[str, float]()
    short = 0
    with ExitStack() as watching:
        for owner, name, part in WATCHED:
            watching.enter_context(split.watched(owner, name, part))
        editor.calibrate(edits[:100])
        for state in editor._session.layers.states:
            watching.enter_context(split.watched(state._master, "correct", "write"))
        bar = watching.enter_context(tqdm(total=len(edits), unit="edit"))
        for at in range(0, len(edits), options.batch_size):
            split.enter("other")
            records = editor.edit(edits[at : at + options.batch_size])
            split.leave()
            rows.append({part: split.seconds[part] - before.get(part, 0.0) for part in PARTS})
            before = dict(split.seconds)
            short += sum(not record.search_converged for record in records)
            bar.update(len(records))
    tenth = max(1, len(rows) // 10)
    total = {part: sum(row[part] for row in rows) for part in PARTS}
    batch = [sum(row.values()) for row in rows]
    flat = {
        part: statistics.median(row[part] for row in rows[-tenth:])
        / max(1e-9, statistics.median(row[part] for row in rows[:tenth]))
        for part in PARTS
        if total[part]
    }
    flat["all"] = statistics.median(batch[-tenth:]) / statistics.median(batch[:tenth])
    memory = (
        {"model_bytes": model_bytes, "peak_beyond_model": torch.cuda.max_memory_allocated() - model_bytes}
        if cuda
        else {}
    )
    return {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in editor.model.parameters()),
        "layers": editor.layers,
        "edits": len(edits),
        "batch_size": options.batch_size,
        "seconds": sum(batch),
        "edits_per_second": len(edits) / sum(batch),
        "seconds_by_part": total,
        "share_by_part": {part: seconds / sum(batch) for part, seconds in total.items()},
        "flat": flat,
        "not_converged": short,
        "mean_steps": statistics.mean(record.search_steps for record in editor.history()),
        "memory_cap": options.memory_cap,
        "prefixed": editor.context.site.decoder.prefixed,
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled() if cuda else None,
        "state_bytes": sum(layer.state for layer in editor.context.memory()),
        **memory,
        "batches": rows,
        "config": editor.config.to_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("demo", *SHAPES), default="demo")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--search-memory", type=int, help="memory limit of the value search in bytes, see EditConfig")
    parser.add_argument(
        "--no-cudnn-attention",
        action="store_true",
        help="disable cuDNN attention, which creates a new plan for each shape",
    )
    parser.add_argument("--memory-cap", type=int, help="memory limit of this process on the CUDA device in bytes")
    add_json(parser)
    options = parser.parse_args()
    if options.memory_cap and torch.device(options.device).type != "cuda":
        parser.error("--memory-cap requires --device cuda")
    result = measure(options)
    shown = ("edits", "seconds", "edits_per_second", "share_by_part", "flat", "not_converged", "mean_steps")
    for name in shown:
        print(f"{name}: {result[name]}")
    about = {"device": options.device, "backend": dispatch.requested(None), "seed": SEED}
    record(options.json, "a stream of edits, end to end", **about, **result)


if __name__ == "__main__":
    main()
