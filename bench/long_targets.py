"""Measures how well long targets take: one edit per target, each written into the unedited model.

    python bench/long_targets.py --model path/to/checkpoint --text text.txt --tokens 8 32 128 300 --json FILE

The targets are the beginnings of paragraphs of the text, cut to a number of tokens, after the prompt "The note of
SUBJECT reads:". Reported for each length, as means over the edits: the fraction of target tokens that are ranked first
after the write, the NLL per token before and after, the number of target tokens that greedy generation gives before the
first difference, and the steps and CPU seconds of an edit.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from recording import add_json, record

import rlsedit_fast as rf
from rlsedit_fast.evaluation.grounds import running_text
from rlsedit_fast.evaluation.layer_trials import restored
from rlsedit_fast.evaluation.scoring import score_rows
from rlsedit_fast.models import encode_fact, greedy
from rlsedit_fast.models.loading import load_model
from rlsedit_fast.statistics.sources import GivenTexts

SUBJECTS = ("Ellen Marwick", "Tobias Renholm", "Ines Calderwood", "Viktor Lasance", "Maud Pellegrin")


def targets(tokenizer: Any, texts: list[str], tokens: int, count: int) -> list[str]:
    """Returns the beginnings of different paragraphs, joined if they are short."""
    found, at = [], 0
    while len(found) < count:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += tokenizer(" " + texts[at], add_special_tokens=False)["input_ids"]
            at += 1
        found.append(tokenizer.decode(ids[:tokens]).strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model checkpoint")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text file, one paragraph per line")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 128, 300])
    parser.add_argument("--edits", type=int, default=2, help="number of edits per length, at most 5")
    parser.add_argument("--anchors", type=int, default=20_000, help="number of anchor tokens")
    parser.add_argument("--bare", action="store_true", help="search without context prefixes and chat")
    add_json(parser)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype="float32")
    texts = running_text(options.text)
    half = len(texts) // 2
    config = rf.EditConfig(contexts={"prefixes": ("",), "chat": ()} if options.bare else {})
    statistics, rows = None, []
    for tokens in options.tokens:
        each: list[dict[str, float]] = []
        for subject, target in zip(SUBJECTS, targets(tokenizer, texts[half:], tokens, options.edits), strict=False):
            edit = rf.Edit("The note of {} reads:", subject, target)
            row = encode_fact(tokenizer, edit)
            (before,) = score_rows(model, [row])
            editor = rf.Editor(model, tokenizer, config=config)
            statistics = statistics or editor.statistics(GivenTexts(texts[:half]), tokens=options.anchors)
            editor.anchor(statistics)
            with restored(editor.context.projections):
                began = time.process_time()
                (result,) = editor.edit([edit])
                seconds = time.process_time() - began
                (after,) = score_rows(model, [row])
                (said,) = greedy(model, [row.ids[: row.prompt_length]], [len(row.target)])
            same = [a == b for a, b in zip(said, row.target, strict=False)]
            each.append(
                {
                    "ranked_first": after.token_accuracy,
                    "nll_before": before.nll,
                    "nll": after.nll,
                    "search_nll": result.search_nll,
                    "generated": float(same.index(False) if False in same else len(same)),
                    "steps": float(result.search_steps),
                    "cpu_seconds": seconds,
                }
            )
        rows.append(
            {"tokens": tokens, "edits": len(each)} | {key: sum(one[key] for one in each) / len(each) for key in each[0]}
        )
        print(rows[-1], flush=True)
        about = {"model": Path(options.model).name, "contexts": config.to_dict()["contexts"]}
        record(options.json, "long targets", **about, threads=torch.get_num_threads(), rows=rows)


if __name__ == "__main__":
    main()
