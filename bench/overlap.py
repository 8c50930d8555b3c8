"""Used shares of keys: do they separate edits that repeat an earlier subject from edits of new subjects?

    python bench/overlap.py smollm2 --data counterfact-10k.json --text DIR --json FILE

The keys of CounterFact edits of different subjects are applied to the solver states of the default layers, with the
priors of the default settings; values do not matter for used shares, so nothing is searched and the model is not
modified. After some numbers of edits, two groups of 200 keys are projected: the rephrased prompts of subjects that are
applied, evenly spaced, and the prompts of subjects that are not. AUC is the probability that the used share of a
repeated subject exceeds that of a new one.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from real_models import checkpoint
from real_stream import edit_of, facts, paragraphs, spread
from recording import add_json, record
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlsedit_fast as rf
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.rows import row_weights, rows_of_contexts
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.statistics.sources import GivenTexts
from rlsedit_fast.world import RELATIONS, World, load_demo_model

PROBED = 200
AT_ONCE = 100


def demo_pairs() -> list[tuple[rf.Edit, rf.Edit]]:
    """Returns for each person of the synthetic world an edit, and another edit of the person under another prompt."""
    found = []
    for at, person in enumerate(World.generate().people):
        first, second = RELATIONS[at % len(RELATIONS)], RELATIONS[(at + 1) % len(RELATIONS)]
        found.append(
            tuple(rf.Edit(one.phrasings[0], person.name, one.values[at % len(one.values)]) for one in (first, second))
        )
    return found


def used(state: Any, keys: torch.Tensor) -> torch.Tensor:
    """Returns the used share of each key alone."""
    return 1 - state.project(keys).gram.diagonal().double() / state.prior_variance(keys)


def auc(repeated: torch.Tensor, new: torch.Tensor) -> float:
    """Returns the probability that a value of `repeated` exceeds one of `new`."""
    return float((repeated[:, None] > new).double().mean() + (repeated[:, None] == new).double().mean() / 2)


def quantiles(values: torch.Tensor) -> dict[str, float]:
    return {str(q): round(float(values.quantile(q)), 4) for q in (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("demo", "smollm2"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text", type=Path, metavar="DIR")
    parser.add_argument("--marks", type=int, nargs="+", default=[100, 300, 1000, 2000])
    parser.add_argument("--mu", type=float, default=36.4, help="as calibrated for adherence 0.8")
    parser.add_argument("--tokens", type=int, default=20_000, help="anchor tokens")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="save all used shares")
    add_json(parser)
    options = parser.parse_args()
    most = max(options.marks)
    if options.model == "demo":
        model, tokenizer = load_demo_model()
        pairs = demo_pairs()
        editor = rf.Editor(model, tokenizer, config=CONFIG)
        editor.anchor(anchor_texts(World.generate(), 0), tokens=options.tokens)
        editor.calibrate([edit for edit, _ in pairs[:30]])
    else:
        path = checkpoint(options.model)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
        pairs = [
            (edit_of(one), edit_of(one | {"prompt": one["rephrase_prompt"]}))
            for one in facts(options.data, 7000)
            if one["rephrase_prompt"].count(one["subject"]) == 1 and one["rephrase_prompt"] != one["prompt"]
        ]
        editor = rf.Editor(model, tokenizer, config=rf.EditConfig(prior={"mu": options.mu}, contexts={"chat": ()}))
        editor.anchor(GivenTexts(paragraphs(options.text / "wikitext2-valid.txt")), tokens=options.tokens)
        editor.calibrate([pairs[0][0]])
    some, rest = pairs[:most], pairs[most : most + PROBED]
    context, states = editor.context, editor._session.layers.states

    def keys_of(edits: list[rf.Edit], *, bare: bool = False) -> list[torch.Tensor]:
        """Returns the keys `[n, contexts, d_k]` per layer, in all contexts or only at the bare prompt."""
        with quiet(model), torch.no_grad():
            found: list[list[torch.Tensor]] = [[] for _ in states]
            for at in range(0, len(edits), AT_ONCE):
                requests = context.prepare(edits[at : at + AT_ONCE])
                requests = [replace(one, contexts=one.contexts[:1]) for one in requests] if bare else requests
                read, _ = request_keys(context.decoder, context.projections, requests)
                for kept, keys in zip(found, read, strict=True):
                    kept.append(keys)
            return [torch.cat(kept) for kept in found]

    start = time.perf_counter()
    new = keys_of([edit for edit, _ in rest], bare=True)
    seconds = (time.perf_counter() - start) / len(rest)
    weights = torch.tensor(row_weights(len(context.config.contexts.prefixes), context.config.contexts.bare_weight))
    rows, kept = [], {}
    for at in range(0, most, AT_ONCE):
        for state, keys in zip(states, keys_of([edit for edit, _ in some[at : at + AT_ONCE]]), strict=True):
            some_rows = rows_of_contexts(keys, "contexts")
            panel = state.project(some_rows, weights.repeat(len(some_rows) // len(weights)))
            state.update_projected(panel, some_rows.new_zeros(len(some_rows), state.value_width))
        count = at + AT_ONCE
        if count not in options.marks:
            continue
        earlier = [again for _, again in spread(some[:count], PROBED)]
        for layer, state, again, fresh in zip(editor.layers, states, keys_of(earlier, bare=True), new, strict=True):
            repeated = used(state, again[:, 0])
            others = used(state, fresh[:, 0])
            kept[count, layer] = repeated, others
            row = {"edits": count, "layer": layer, "auc": round(auc(repeated, others), 4)}
            row |= {"repeated": quantiles(repeated), "new": quantiles(others)}
            rows.append(row)
            print(row, flush=True)
        if options.keep:
            torch.save(kept, options.keep)
        record(
            options.json,
            "Used shares of the keys of repeated and of new subjects",
            model=options.model,
            mu=options.mu,
            probed=PROBED,
            anchor_tokens=options.tokens,
            seconds_per_bare_key=round(seconds, 4),
            rows=rows,
        )


if __name__ == "__main__":
    main()
