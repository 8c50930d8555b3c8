"""Edits a small trained mixture of experts and compares ways of editing its experts.

    python bench/expert_world.py train --model DIR
    python bench/expert_world.py compare --model DIR --json bench/results/expert-world.json

`train` trains the model on the facts of the demo model's world: 4 layers with 8 experts of width 256, of which 2
process a token, and a shared expert of width 512. `compare` applies 500 edits in batches of 10 with every way of
editing, on the same facts, anchors and settings of the value search, for several seeds. Reported are strict efficacy
after all edits, paraphrases, neighbors with unchanged answers, the first hundred edits after all edits, the harmonic
mean of efficacy, neighbors and first hundred, other facts of the subjects, and seconds of editing.

mu is calibrated for RLS. A baseline is tried with this mu and with smaller ones (`--scales`) on the first seed; the one
with the largest mean is used for the other seeds, too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from recording import add_json, record

from rlsedit_fast import EditConfig, Editor
from rlsedit_fast.evaluation.cases import world_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.metrics import efficacy_strict, evaluate, harmonic_mean, score_before
from rlsedit_fast.world import World, load_demo_model
from rlsedit_fast.world.train import Recipe, recall, train

RECIPE = Recipe(intermediate=256, experts=8, active=2, shared=512, steps=2000)

EXACT = "rls, exact"
WAYS: dict[str, dict[str, Any]] = {
    EXACT: {"experts": "exact"},
    "rls, separate": {"experts": "separate"},
    "memit per expert": {"rule": "memit", "experts": "split", "same_subject": "separate"},
    "alphaedit per expert": {
        "rule": "alphaedit",
        "rule_options": {"null_share": 0.7, "ridge": 1.0},
        "experts": "split",
        "same_subject": "separate",
    },
    "memit, shared expert": {"rule": "memit", "experts": "shared", "same_subject": "separate"},
    "memit, one expert": {"rule": "memit", "experts": "top", "same_subject": "separate"},
}


def run(directory: Path, config: EditConfig, count: int, seed: int, mu: float | None = None) -> dict[str, Any]:
    """Applies the edits, with a given mu or a calibrated one, and returns the metrics."""
    if mu is not None:
        config = config.replace(prior={"mu": mu, "lam": None})
    model, tokenizer = load_demo_model(directory)
    world = World.generate()
    cases = world_cases(world, count, seed)
    before = score_before(model, tokenizer, cases)
    editor = Editor(model, tokenizer, config=config)
    editor.anchor(anchor_texts(world, seed))
    began = time.perf_counter()
    records = editor.edit([case.edit for case in cases])
    seconds = time.perf_counter() - began
    report = evaluate(model, tokenizer, cases, before)
    first = efficacy_strict(model, tokenizer, cases[:100])
    figures = {
        "efficacy": report.efficacy.strict,
        "generalization": report.generalization.strict,
        "neighbors": report.neighbors.strict,
        "first_hundred": first,
    }
    return figures | {
        "mean": harmonic_mean([figures["efficacy"], figures["neighbors"], figures["first_hundred"]]),
        "same_subject": report.same_subject.strict,
        "stated_when_written": sum(one.success for one in records) / len(records),
        "change": editor.deviation()[0].weight,
        "mu": editor.priors[0].mu,
        "seconds": seconds,
    }


def main() -> None:
    """Trains or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "compare"))
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="training steps")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1, 0.5, 0.25, 0.1, 0.05], help="of the baselines' mu"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS)[1:], default=list(WAYS)[1:], metavar="WAY")
    add_json(parser)
    options = parser.parse_args()
    if options.action == "train":
        train(Recipe(**{**vars(RECIPE), "steps": options.steps}), options.model)
        return
    model, tokenizer = load_demo_model(options.model)
    known, rows = recall(model, tokenizer, World.generate(), 10_000), list[dict[str, Any]]()

    def add(way: str, seed: int, mu: float | None = None, scale: float = 1) -> dict[str, Any]:
        config = CONFIG.replace(batch_size=10, layers=[options.layer], **WAYS[way])
        found = run(options.model, config, options.edits, seed, None if mu is None else mu * scale)
        rows.append({"way": way, "seed": seed, "scale": scale, **found})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        record(
            options.json,
            "Ways of editing a small trained mixture of experts",
            edits=options.edits,
            layer=options.layer,
            known=known,
            rows=rows,
        )
        return rows[-1]

    best: dict[str, float] = {}
    for seed in options.seeds:
        mu = add(EXACT, seed)["mu"]
        for way in options.ways:
            if "rule" not in WAYS[way]:
                add(way, seed)
            elif way in best:
                add(way, seed, mu, best[way])
            else:
                tried = {scale: add(way, seed, mu, scale)["mean"] for scale in options.scales}
                best[way] = max(tried, key=tried.__getitem__)


if __name__ == "__main__":
    main()
