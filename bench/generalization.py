"""Compares settings of the value search by how well edits generalize to paraphrases.

    python bench/generalization.py --model path/to/checkpoint --data counterfact.json --text text.txt \\
        --json bench/results/generalization.json

Each setting applies the same edits in one batch and evaluates the targets on the edited prompts and their paraphrases.
All but one have no contexts in a chat, which take most of the time of a search.
Fractions of 100 edits have a standard error of about 0.04. The scores (see `Trial`) are less noisy and are compared
with those of the first setting per edit. Drift is measured on the last quarter of the text; the rest is used as
anchors.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layer_choice import paraphrased_edits
from recording import add_json, record

from rlsedit_fast.editing import EditConfig
from rlsedit_fast.errors import RLSEditError
from rlsedit_fast.evaluation.grounds import running_text
from rlsedit_fast.evaluation.layer_trials import Trials
from rlsedit_fast.evaluation.layers import compare
from rlsedit_fast.models.loading import load_model

TOPICS = (
    "",
    "The weather was cold that morning, and the harbor was empty.",
    "She put the book back on the shelf and left the room.",
    "Trains on the northern line run every ten minutes.",
    "The recipe needs two eggs and a cup of flour.",
    "Shares fell slightly in early trading on Monday.",
    "He had never learned to play an instrument.",
    "The museum is closed for repairs until spring.",
    "Most of the plants in the garden need little water.",
    "The committee will meet again in two weeks.",
)
"""Short texts of other topics; the paraphrases of CounterFact often follow such a sentence."""

SETTINGS: dict[str, dict[str, Any]] = {
    "no contexts in a chat": {},
    "contexts in a chat": {"contexts": {"chat": None}},
    "the prompt alone": {"contexts": {"prefixes": ("",)}},
    "3 topics": {"contexts": {"prefixes": TOPICS[:3]}},
    "6 topics": {"contexts": {"prefixes": TOPICS[:6]}},
    "10 topics": {"contexts": {"prefixes": TOPICS}},
    "10 sampled prefixes": {"contexts": {"prefixes": ("",), "samples": 10}},
    "learning rate 0.2": {"search": {"learning_rate": 0.2}},
    "learning rate 0.3": {"search": {"learning_rate": 0.3}},
    "search to 0.02": {"search": {"stop_nll": 0.02}},
    "search to 0.01": {"search": {"stop_nll": 0.01}},
    "search to 0.01, clamp 1.5": {"search": {"stop_nll": 0.01, "clamp": 1.5}},
    "no KL term": {"search": {"kl_prompts": ()}},
    "at the last token": {"fact_token": "last"},
    "adherence 0.99": {"prior": {"adherence": 0.99}},
    "mean keys": {"contexts": {"rows": "mean"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="model checkpoint")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="edits with paraphrases")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text file, one paragraph per line")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=50_000, help="number of anchor tokens")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    add_json(parser)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype="float32")
    texts = running_text(options.text)
    cut = len(texts) * 3 // 4
    edits = paraphrased_edits(options.data, options.edits)
    config = EditConfig(contexts={"chat": ()})
    trials = Trials(model, tokenizer, edits, texts[:cut], texts[cut:], config=config, tokens=options.tokens)
    rows: list[dict[str, Any]] = []
    first = None
    for name in options.settings:
        try:
            trial = trials.run(config.replace(**SETTINGS[name]))
        except RLSEditError as error:
            print(f"{name}: {error}", flush=True)
            continue
        first = first or trial
        difference, difference_error = compare(trial, first)
        row = {"setting": name, **asdict(trial), "score_difference": difference, "score_error": difference_error}
        rows.append(row)
        shown = ("efficacy", "generalization", "specificity", "nll", "paraphrase_nll", "kl", "change", "seconds")
        figures = "  ".join(f"{key}={row[key]:.3f}" for key in shown if row[key] is not None)
        print(f"{name}: {figures}", flush=True)
    about = {"model": Path(options.model).name, "edits": len(edits), "anchor_tokens": trials.anchor_tokens}
    record(options.json, "generalization", **about, rows=rows)


if __name__ == "__main__":
    main()
