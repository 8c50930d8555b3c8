"""Applies a stream of CounterFact edits to a real pre-trained model and evaluates it.

    python bench/real_stream.py smollm2 --edits 300 1000 --data counterfact-10k.json --text DIR --out bench/results/real

DIR contains `wikitext2-valid.txt` (anchors, 50,000 tokens) and `wikitext2-test.txt` (perplexity). The edits are kept in
a store in `--work`; an interrupted run continues after the last applied batch. `--set` changes a setting, such as
`--set prior={'adherence': 0.9}`.

Evaluated after each number of `--edits`, on at most `--asked` evenly spaced edits, before and after: efficacy and
generalization (new target more likely than the true one; strict: each token ranked first) and specificity (true answer
more likely than the new target after the neighborhood prompt); if the model has a chat template, how at most
`--in-chat` edits hold in a chat (see `chat.py`); success of the first, middle and last 100 edits; perplexity before and
after; seconds. `--consolidate` then consolidates and evaluates again at the end.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from real_models import checkpoint
from recording import record
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlsedit_fast as rf
from rlsedit_fast.evaluation import Case, Question, chat_neighbors, contains_answer, evaluate_chat, questions_about
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.models.answers import supports_chat
from rlsedit_fast.statistics.sources import GivenTexts

ANCHOR_TOKENS = 50_000
WINDOW = 512


def facts(path: Path, count: int) -> list[dict[str, str]]:
    """Returns the first `count` CounterFact records (EasyEdit layout) with different subjects that occur once."""
    chosen: dict[str, dict[str, str]] = {}
    for one in json.loads(path.read_text(encoding="utf-8")):
        if one["prompt"].count(one["subject"]) == 1:
            chosen.setdefault(one["subject"], one)
    if len(chosen) < count:
        raise SystemExit(f"{path}: only {len(chosen)} usable records; reduce --edits {count}")
    return list(chosen.values())[:count]


def edit_of(one: dict[str, str]) -> rf.Edit:
    return rf.Edit(one["prompt"].replace(one["subject"], "{}"), one["subject"], one["target_new"])


def paragraphs(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.split()) > 8]


def spread(some: list[Any], most: int) -> list[Any]:
    return [some[at * len(some) // min(most, len(some))] for at in range(min(most, len(some)))]


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, texts: list[str], tokens: int) -> float:
    """Returns the perplexity over independent windows of 512 tokens."""
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"][:tokens]
    start = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    total = count = 0.0
    for at in range(0, len(ids) - WINDOW + 1, WINDOW):
        window = torch.tensor([start + ids[at : at + WINDOW]])
        logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return math.exp(total / count)


def evaluate(model: Any, tokenizer: Any, some: list[dict[str, str]]) -> dict[str, float]:
    """Returns the metrics of the given facts."""
    pairs = []
    for one in some:
        for prompt in ("prompt", "rephrase_prompt"):
            pairs += [(one[prompt], one["target_new"]), (one[prompt], one["ground_truth"])]
        pairs += [(one["locality_prompt"], one["target_new"]), (one["locality_prompt"], one["locality_ground_truth"])]
    found = score(model, tokenizer, pairs)
    each = [found[at : at + 6] for at in range(0, len(found), 6)]
    count = len(each)
    return {
        "efficacy": sum(new.nll < true.nll for new, true, *_ in each) / count,
        "efficacy_strict": sum(new.exact for new, *_ in each) / count,
        "generalization": sum(one[2].nll < one[3].nll for one in each) / count,
        "generalization_strict": sum(one[2].exact for one in each) / count,
        "specificity": sum(one[5].nll < one[4].nll for one in each) / count,
    }


def case_of(one: dict[str, str]) -> Case:
    """Returns an evaluation case of a CounterFact record."""
    edit = edit_of(one)
    neighbor = Question(one["locality_prompt"], one["locality_ground_truth"])
    old = Question(one["prompt"], one["ground_truth"])
    return Case(edit, old, (), (neighbor,), (), (), asked=questions_about(edit.prompt, edit.subject))


def next_tokens(model: Any, tokenizer: Any, cases: list[Case]) -> list[int]:
    """Returns the most likely token after each neighborhood prompt."""
    found = score(model, tokenizer, [(case.neighbors[0].prompt, "a") for case in cases])
    return [one.predicted[0] for one in found]


def in_chat(model: Any, tokenizer: Any, cases: list[Case], before: dict[str, int]) -> dict[str, Any]:
    """Returns the metrics in a chat."""
    found = evaluate_chat(model, tokenizer, cases, before)
    wordings: dict[str, list[bool]] = {}
    answers = iter(found.answers)
    for case in cases:
        for at, _ in enumerate(case.asked, 1):
            _, target, answer = next(answers)
            wordings.setdefault(f"wording {at}", []).append(contains_answer(answer, target))
    return {
        "start_strict": found.start.count / found.start.of,
        "questions": found.question.count / found.question.of,
        "questions_by_wording": {name: sum(hits) / len(hits) for name, hits in wordings.items()},
        "neighbors_unchanged": found.neighbors.count / found.neighbors.of,
        "examples": [list(one) for one in found.answers[:12]],
    }


def unchanged(base: Any, model: Any, tokenizer: Any, cases: list[Case]) -> float:
    """Returns the share of neighborhood prompts with the same next token in both models."""
    pairs = zip(next_tokens(base, tokenizer, cases), next_tokens(model, tokenizer, cases), strict=True)
    return sum(before == after for before, after in pairs) / len(cases)


def chat_figures(base: Any, model: Any, tokenizer: Any, cases: list[Case]) -> dict[str, Any] | None:
    """Returns the metrics in a chat before and after the edits; None without a chat template."""
    if not supports_chat(tokenizer):
        return None
    before = chat_neighbors(base, tokenizer, cases)
    return {"before": in_chat(base, tokenizer, cases, before), "after": in_chat(model, tokenizer, cases, before)}


def stated(model: Any, tokenizer: Any, some: list[dict[str, str]]) -> float:
    found = score(model, tokenizer, [(one["prompt"], one["target_new"]) for one in some])
    return sum(one.exact for one in found) / len(found)


class Clock:
    """Seconds of editing, kept in a file over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = float(path.read_text()) if path.exists() else 0.0
        self.began = time.perf_counter()

    def start(self) -> None:
        self.began = time.perf_counter()

    def save(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.began
        self.began = now
        self.path.write_text(f"{self.seconds:.3f}\n")


def figures(
    editor: rf.Editor,
    base: Any,
    tokenizer: Any,
    every: list[dict[str, str]],
    text: list[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the metrics after the given edits."""
    records = editor.history()
    sample = spread(every, options.asked)
    cases = [case_of(one) for one in sample]
    middle = max(0, len(every) // 2 - 50)
    ages = {"first": every[:100], "middle": every[middle : middle + 100], "last": every[-100:]}
    found = {
        "asked": len(sample),
        "before": evaluate(base, tokenizer, sample),
        "after": evaluate(editor.model, tokenizer, sample),
        "stated_in_records": sum(one.success for one in records) / len(records),
        "realized_when_written": sum(one.realized for one in records) / len(records),
        "stated_now": {age: stated(editor.model, tokenizer, group) for age, group in ages.items()},
        "perplexity": perplexity(editor.model, tokenizer, text, options.tokens),
        "neighbors_unchanged": unchanged(base, editor.model, tokenizer, cases),
        "deviation": {str(one.layer): round(one.weight, 2) for one in editor.deviation()},
    }
    print(len(every), json.dumps(found), flush=True)
    spoken = spread(cases, options.in_chat)
    return found | {"chat": chat_figures(base, editor.model, tokenizer, spoken) if spoken else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("smollm2", "gemma3-270m"))
    parser.add_argument("--edits", type=int, nargs="+", default=[1000], metavar="N", help="counts at which to evaluate")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("bench/results/real"), metavar="DIR")
    parser.add_argument("--work", type=Path, default=Path("build/real"), metavar="DIR")
    parser.add_argument("--asked", type=int, default=300)
    parser.add_argument("--in-chat", type=int, default=100, help="number of edits that are evaluated in a chat")
    parser.add_argument("--tokens", type=int, default=20_480, help="number of tokens for perplexity")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of EditConfig")
    parser.add_argument("--consolidate", action="store_true")
    parser.add_argument("--label", default="default", help="label of the settings, used in the name of the result file")
    options = parser.parse_args()
    changes = {name: ast.literal_eval(value) for name, value in (one.split("=", 1) for one in options.set)}

    name = f"{options.model}-{options.label}"
    suffix = f"-batch{options.batch_size}" if options.batch_size != 100 else ""
    path = checkpoint(options.model)
    every = facts(options.data, max(options.edits))
    test_text = paragraphs(options.text / "wikitext2-test.txt")
    base = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = rf.EditConfig(batch_size=options.batch_size, **changes)
    editor = rf.Editor.from_pretrained(path, store=options.work / (name + suffix), config=config)
    if not editor.priors:
        valid = GivenTexts(paragraphs(options.text / "wikitext2-valid.txt"))
        editor.anchor(editor.statistics(valid, tokens=ANCHOR_TOKENS))
    clock = Clock(options.work / (name + suffix) / "benchmark-seconds.txt")

    def on_batch(records: list[rf.EditRecord]) -> None:
        clock.save()
        good = sum(one.success for one in records)
        share = sum(one.realized for one in records) / len(records)
        print(f"{records[-1].id} edits: {good} of {len(records)} stated, realized {share:.3f}", flush=True)

    for count in sorted(options.edits):
        done = len(editor.history())
        if done > count:
            continue
        if done < count:
            clock.start()
            editor.edit([edit_of(one) for one in every[done:count]], on_batch=on_batch)
            clock.save()
        stages = ["edited", *(["consolidated"] if options.consolidate and count == max(options.edits) else [])]
        after = {}
        for stage in stages:
            if stage == "consolidated":
                clock.start()
                editor.consolidate()
                clock.save()
            after[stage] = figures(editor, base, tokenizer, every[:count], test_text, options)
            after[stage]["seconds_editing"] = round(clock.seconds, 1)
            print(count, stage, json.dumps(after[stage]["chat"], indent=1), flush=True)
        record(
            options.out / f"{name}-{count}{suffix}.json",
            "A stream of CounterFact edits into a real model",
            perplexity_before=perplexity(base, tokenizer, test_text, options.tokens),
            after=after,
            model=options.model,
            edits=count,
            layers=list(editor.layers),
            settings=changes,
            adherence=editor.config.prior.adherence,
            batch_size=options.batch_size,
            threads=torch.get_num_threads(),
            mu=[prior.mu for prior in editor.priors],
        )


if __name__ == "__main__":
    main()
