"""Cost of a store: share of the time per batch, opening, and size.

    python bench/store.py --edits 1000 --json bench/results/store-cpu.json

`batch`: the demo stream, edited with and without a store, alternating batch by batch on two copies of the model, so
that other load affects both; also the time spent in functions of the store. `open`: 10,000 edits at d_k 2048 with
random values, since a value search would take hours and does not affect the result; opened in the state after a kill
just before the next snapshot, which is the worst case. `rounding`: effect of fp16 keys and values on the edits of the
demo and on undo.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from edit_stream import stream
from recording import add_json, record
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from rlsedit_fast import Edit, EditConfig, Editor
from rlsedit_fast.editing import layers
from rlsedit_fast.editing.search import value_search
from rlsedit_fast.editing.search.value_search import Values
from rlsedit_fast.editing.storage.persistence import Recorder
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.metrics import evaluate, score_before
from rlsedit_fast.rls import RLSState
from rlsedit_fast.store import Store
from rlsedit_fast.world import World, load_demo_model
from rlsedit_fast.world.tokens import build_tokenizer

D_K, D_V = 2048, 512


def batch_cost(edits: list[Edit], batch_size: int, place: Path) -> dict[str, Any]:
    """Applies the same stream with and without a store, alternating."""
    inside = [0.0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*arguments)
            finally:
                inside[0] += time.perf_counter() - began

        return timed

    names = ("edit", "revision", "prepare", "commit", "snapshot_if_due")
    timed = {name: counted(getattr(Recorder, name)) for name in names}
    editors = []
    for store in (None, place):
        model, tokenizer = load_demo_model()
        editor = Editor(model, tokenizer, config=CONFIG.replace(batch_size=batch_size), store=store)
        editor.anchor(anchor_texts(World.generate(), 0))
        editor.calibrate(edits[:100])
        editors.append(editor)
    seconds: list[list[float]] = [[], []]
    within: list[float] = []
    with mock.patch.multiple(Recorder, **timed):
        for at in tqdm(range(0, len(edits), batch_size), unit="batch"):
            batch = edits[at : at + batch_size]
            for which in (0, 1) if at // batch_size % 2 else (1, 0):
                inside[0] = 0.0
                began = time.perf_counter()
                editors[which].edit(batch)
                seconds[which].append(time.perf_counter() - began)
                if which:
                    within.append(inside[0])
    sizes, per_edit = editors[1].status(sample=0).sizes, bytes_per_edit(editors[1], len(edits))
    editors[1].close()
    began = time.perf_counter()
    opened = Editor(*load_demo_model(), store=place)
    opening = time.perf_counter() - began
    same = torch.equal(opened._session.layers.states[0].weight, editors[0]._session.layers.states[0].weight)
    return {
        "edits": len(edits),
        "batch_size": batch_size,
        "seconds_without": sum(seconds[0]),
        "seconds_with": sum(seconds[1]),
        "median_batch_without": statistics.median(seconds[0]),
        "median_batch_with": statistics.median(seconds[1]),
        "median_ratio": statistics.median(b / a for a, b in zip(*seconds, strict=True)),
        "share_in_store": sum(within) / sum(seconds[1]),
        "sizes": sizes,
        "bytes_per_edit": per_edit,
        "open_seconds": opening,
        "same_weights_as_without": same,
    }


def wide_model() -> Any:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_V,
        intermediate_size=D_K,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def random_keys(_decoder: Any, projections: Any, requests: Any, *, output_of: Any = None) -> Any:
    return [torch.randn(len(requests), 1, D_K) for _ in projections], torch.zeros(len(requests), 1, D_V)


def random_values(_site: Any, requests: Any, _config: Any, _groups: Any, at_once: int) -> Any:
    count = len(requests)
    done = torch.ones(count, dtype=torch.bool)
    return Values(torch.randn(count, D_V), torch.zeros(count, 1, D_V), *torch.zeros(2, count), done, done), at_once


def copied(source: str, target: str) -> None:
    """Copies a file; tensor files are never modified, so a hard link is sufficient."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


def opening_cost(edits: list[Edit], batch_size: int, keys: Any, place: Path) -> dict[str, Any]:
    """Applies a stream with random keys and values and opens its store in the worst case."""
    with (
        mock.patch.object(layers, "request_keys", random_keys),
        mock.patch.object(value_search, "search_within_memory", random_values),
    ):
        model, tokenizer = wide_model()
        settings: dict[str, Any] = {
            "layers": (0,),
            "contexts": {"prefixes": ("",)},
            "prior": {"lam": 30.0},
            "refine": 0,
        }
        config = EditConfig(batch_size=batch_size, stored_rows=keys, **settings)
        worst, most = place / "worst", -1
        editor = Editor(model, tokenizer, config=config, store=place / "store")
        began = time.perf_counter()
        store = editor._recorder.store
        for at in tqdm(range(0, len(edits), batch_size), unit="batch"):
            editor.edit(edits[at : at + batch_size])
            newest = store.newest_snapshot()
            if at + batch_size >= 0.9 * len(edits) and store.last - (newest.seq if newest else 0) >= most:
                most = store.last - (newest.seq if newest else 0)
                shutil.rmtree(worst, ignore_errors=True)
                shutil.copytree(place / "store", worst, copy_function=copied)
        making = time.perf_counter() - began
        sizes, per_edit = editor.status(sample=0).sizes, bytes_per_edit(editor, len(edits))
        editor.close()
    found = {}
    for name, folder in (("worst", worst), ("at_the_end", place / "store")):
        model, tokenizer = wide_model()
        began = time.perf_counter()
        opened = Editor(model, tokenizer, store=folder)
        found[f"open_seconds_{name}"] = time.perf_counter() - began
        found[f"edits_{name}"] = len(opened.history())
        opened.close()
    same = torch.equal(opened._session.layers.states[0].weight, editor._session.layers.states[0].weight)
    with Store(worst, write=False) as kept:
        replayed = kept.last - (kept.newest_snapshot().seq if kept.newest_snapshot() else 0)
    return {
        "edits": len(edits),
        "batch_size": batch_size,
        "keys": keys,
        "d_k": D_K,
        "d_v": D_V,
        "making_seconds": making,
        "changes_replayed_worst": replayed,
        "same_weights": same,
        "sizes": sizes,
        "bytes_per_edit": per_edit,
        **found,
    }


def rounding_cost(count: int, keys: Any) -> dict[str, Any]:
    """Evaluates the edits with float32 or fp16 keys and values, and the error after undoing half of them."""
    world = World.generate()
    cases = world_cases(world, count, 0)
    model, tokenizer = load_demo_model()
    before = score_before(model, tokenizer, cases)
    editor = Editor(model, tokenizer, config=CONFIG.replace(batch_size=100, stored_rows=keys))
    editor.anchor(anchor_texts(world, 0))
    records = editor.edit([case.edit for case in cases])
    report = evaluate(model, tokenizer, cases, before)
    undone = random.Random(0).sample(range(1, count + 1), count // 2)
    editor.undo(undone)
    (state,) = editor._session.layers.states
    kept = editor._session.ledger.rows(editor._session.ledger.active)
    only = RLSState(state.original, state.prior)
    only.update(torch.cat([rows.keys[0] for rows in kept]), torch.cat([rows.values[0] for rows in kept]))
    return {
        "edits": count,
        "keys": keys,
        "efficacy": report.efficacy.strict,
        "generalization": report.generalization.strict,
        "neighbors": report.neighbors.strict,
        "realized": statistics.mean(record.realized for record in records),
        "undone": len(undone),
        "error_of_weight": float((state.weight - only.weight).norm() / only.weight.norm()),
    }


def bytes_per_edit(editor: Editor, count: int) -> float:
    """Returns the bytes per edit of the files of changes, except the one with the anchors."""
    return sum(entry.file.size for entry in editor._recorder.store.entries[1:] if entry.file) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=2000, help="edits of the demo stream")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--stored", type=int, default=10_000, help="edits in the store that is opened")
    parser.add_argument("--halved", type=int, default=500, help="edits with fp16 keys and values")
    add_json(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        result = {
            "batch": batch_cost(stream(options.edits), options.batch_size, place / "batch"),
            "open": [
                opening_cost(stream(count), size, keys, place / f"open-{size}-{keys}")
                for count, size, keys in (
                    (options.stored, 100, "full"),
                    (options.stored, 100, "fp16"),
                    (options.stored, 10, "full"),
                )
            ],
            "rounding": [rounding_cost(options.halved, keys) for keys in ("full", "fp16")],
        }
    print(json.dumps(result, indent=2))
    record(options.json, "the store's share of a batch, opening a store, sizes", **result)


if __name__ == "__main__":
    main()
