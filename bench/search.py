"""Compares descent methods of the value search by quality and number of steps.

    python bench/search.py --json bench/results/search.json

Each setting edits a new copy of the demo model with the same stream, in batches of 10 with values searched for 100
edits at a time as in the demo, unless stated otherwise. Cost is counted in steps, each one forward and backward pass
above the edited layer, so that it does not depend on machine load.
"""

from __future__ import annotations

import argparse
from typing import Any

from recording import add_json, record

from rlsedit_fast import Editor
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.metrics import evaluate, score_before
from rlsedit_fast.world import World, load_demo_model

SETTINGS: dict[str, dict[str, Any]] = {
    "constrained (default)": {},
    "constrained 0.06": {"search": {"learning_rate": 0.06}},
    "constrained 0.18": {"search": {"learning_rate": 0.18}},
    "constrained, batch by batch": {"search": {"ahead": None}},
    "constrained, no KL term": {"search": {"kl_prompts": ()}},
    "constrained, KL at '{} is a' only": {"search": {"kl_prompts": ("{} is a",)}},
    "normalized 0.06": {"search": {"optimizer": "normalized", "learning_rate": 0.06, "stop_nll": 0.03}},
    "normalized 0.09": {"search": {"optimizer": "normalized", "stop_nll": 0.03}},
    "normalized 0.18": {"search": {"optimizer": "normalized", "learning_rate": 0.18, "stop_nll": 0.03}},
    "adam 0.1": {"search": {"optimizer": "adam", "learning_rate": 0.1, "steps": 100, "stop_nll": 0.03}},
    "adam 0.3": {"search": {"optimizer": "adam", "learning_rate": 0.3, "steps": 100, "stop_nll": 0.03}},
}


def measure(name: str, changes: dict[str, Any], edits: int, batch_size: int, seed: int) -> dict[str, Any]:
    model, tokenizer = load_demo_model()
    world = World.generate()
    cases = world_cases(world, edits, seed)
    before = score_before(model, tokenizer, cases)
    editor = Editor(model, tokenizer, config=CONFIG.replace(batch_size=batch_size, **changes))
    editor.anchor(anchor_texts(world, seed))
    records = editor.edit([case.edit for case in cases])
    report = evaluate(model, tokenizer, cases, before)
    return {
        "setting": name,
        "mean_steps": sum(r.search_steps for r in records) / edits,
        "not_converged": sum(not r.search_converged for r in records),
        "efficacy_strict": report.efficacy.strict,
        "generalization_strict": report.generalization.strict,
        "neighbors_unchanged": report.neighbors.strict,
        "namesakes_unchanged": report.namesakes.strict,
        "same_subject_unchanged": report.same_subject.strict,
        "drift": editor.deviation()[0].weight,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--edits", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    add_json(parser)
    options = parser.parse_args()
    rows = []
    for name in options.settings:
        row = measure(name, SETTINGS[name], options.edits, options.batch_size, options.seed)
        print("  ".join(f"{key}={value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items()))
        rows.append(row)
    stream = {"edits": options.edits, "batch_size": options.batch_size, "seed": options.seed}
    record(options.json, "value search", **stream, rows=rows)


if __name__ == "__main__":
    main()
