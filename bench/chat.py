"""Measures how well edits hold in the chat of an instruct model, for several contexts of the value search.

    python bench/chat.py --model smollm2 --data counterfact-10k.json --text DIR --edits 100 --json FILE

Each way applies the same CounterFact edits in one batch to the unedited model. DIR contains `wikitext2-valid.txt`
(anchors, 50,000 tokens) and `wikitext2-test.txt` (perplexity). Measured, before and after:

- raw text: efficacy, generalization and specificity as in `real_stream.py`, and the share of neighborhood prompts with
  the same next token as before
- chat, see `rlsedit_fast/evaluation/chat.py`: the prompt as the start of the answer; questions, answered greedily
  within 20 tokens, in three wordings that no edit is searched with (`evaluation/relations.json`); and the share of
  neighborhood prompts, as the start of an answer, with the same next token as before
- seconds of CPU time of the edits
"""

from __future__ import annotations

import argparse
import ast
import time
from pathlib import Path
from typing import Any

import torch
from real_models import checkpoint
from real_stream import ANCHOR_TOKENS, case_of, evaluate, facts, in_chat, next_tokens, paragraphs, perplexity
from recording import add_json, record

import rlsedit_fast as rf
from rlsedit_fast.evaluation import chat_neighbors
from rlsedit_fast.evaluation.layer_trials import restored
from rlsedit_fast.models.loading import load_model
from rlsedit_fast.statistics import KeyStatistics
from rlsedit_fast.statistics.sources import GivenTexts

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "no chat": {"contexts": {"chat": ()}},
    "answer": {"contexts": {"chat": ("answer",)}},
    "message": {"contexts": {"chat": ("message",)}},
    "answer, message": {"contexts": {"chat": ("answer", "message")}},
    "answer, direct": {"contexts": {"chat": ("answer", "direct")}},
    "answer, direct, bare": {"contexts": {"chat": ("answer", "direct"), "prefixes": ("",)}},
    "answer, direct, one prefix": {
        "contexts": {"chat": ("answer", "direct"), "prefixes": ("", "The report says this.")}
    },
    "answer, message, direct": {"contexts": {"chat": ("answer", "message", "direct")}},
}
"""Settings of `EditConfig` by name."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2",), default="smollm2")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=5120, help="number of tokens for perplexity")
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="anchors, by `rlsedit statistics`")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EditConfig for all ways")
    add_json(parser)
    options = parser.parse_args()
    changes = {name: ast.literal_eval(value) for name, value in (one.split("=", 1) for one in options.set)}
    model, tokenizer = load_model(checkpoint(options.model), dtype="float32")
    every = facts(options.data, options.edits)
    cases = [case_of(one) for one in every]
    test_text = paragraphs(options.text / "wikitext2-test.txt")
    anchors = GivenTexts(paragraphs(options.text / "wikitext2-valid.txt"))
    neighbors, spoken = next_tokens(model, tokenizer, cases), chat_neighbors(model, tokenizer, cases)
    before = {
        **evaluate(model, tokenizer, every),
        "perplexity": perplexity(model, tokenizer, test_text, options.tokens),
        "chat": in_chat(model, tokenizer, cases, spoken),
    }
    print("before", before, flush=True)
    rows: dict[str, Any] = {}
    statistics = None if options.statistics is None else KeyStatistics.load(options.statistics)
    for name in options.ways:
        config = rf.EditConfig(batch_size=max(100, options.edits), **changes).replace(**WAYS[name])
        editor = rf.Editor(model, tokenizer, config=config)
        statistics = statistics or editor.statistics(anchors, tokens=ANCHOR_TOKENS)
        editor.anchor(statistics)
        with restored(editor.context.projections):
            began = time.process_time()
            records = editor.edit([case.edit for case in cases])
            seconds = time.process_time() - began
            kept = next_tokens(model, tokenizer, cases)
            rows[name] = {
                "contexts": editor.config.to_dict()["contexts"],
                "cpu_seconds": round(seconds, 1),
                "converged": sum(one.search_converged for one in records) / len(records),
                "steps": sum(one.search_steps for one in records) / len(records),
                "realized": sum(one.realized for one in records) / len(records),
                **evaluate(model, tokenizer, every),
                "neighbors_unchanged": sum(a == b for a, b in zip(neighbors, kept, strict=True)) / len(kept),
                "perplexity": perplexity(model, tokenizer, test_text, options.tokens),
                "chat": in_chat(model, tokenizer, cases, spoken),
            }
        print(name, rows[name], flush=True)
        record(
            options.json,
            "CounterFact edits in raw text and in a chat",
            model=options.model,
            edits=options.edits,
            settings=changes,
            layers=list(editor.layers),
            threads=torch.get_num_threads(),
            before=before,
            ways=rows,
        )


if __name__ == "__main__":
    main()
