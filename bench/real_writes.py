"""Compares settings of writing one batch into a real model with the same values.

    python bench/real_writes.py smollm2 --data counterfact-10k.json --text DIR --json bench/results/real/writes.json \
        --settings "prior={'adherence': 0.95}" "contexts={'rows': 'mean'}"

The values of 100 CounterFact edits are searched once, in the unedited model. Each setting writes them in one batch
without refinement. Text is the first 1,536 tokens of the WikiText-2 test set; anchors are 50,000 tokens of its
validation set. KL is KL(before || after) of the next token in nats.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from real_models import checkpoint
from real_stream import edit_of, facts, paragraphs
from recording import add_json, record
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlsedit_fast as rf
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.search.value_search import ValueFinder
from rlsedit_fast.evaluation.scoring import score
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.statistics.sources import GivenTexts

WINDOWS, WINDOW = 6, 256


@torch.no_grad()
def next_tokens(model: Any, tokenizer: Any, texts: list[str], prompts: list[str]) -> list[torch.Tensor]:
    """Returns log-probabilities over windows of text and after prompts."""
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"][: WINDOWS * WINDOW]
    windows = torch.tensor(ids).view(-1, WINDOW)
    on_text = [model(input_ids=one[None], use_cache=False).logits.log_softmax(-1).half() for one in windows]
    after_prompts = [
        model(input_ids=torch.tensor([tokenizer(one)["input_ids"]])).logits[:, -1].log_softmax(-1) for one in prompts
    ]
    return [torch.cat(on_text), torch.cat(after_prompts)]


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    return sum(
        float((one.exp() * (one - two)).sum(-1).mean())
        for one, two in ((was.float(), now.float()) for was, now in zip(before, after, strict=True))
    ) / len(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("smollm2", "gemma3-270m"))
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--settings", nargs="+", default=["prior={'adherence': 0.8}"], metavar="NAME=VALUE,...")
    add_json(parser)
    options = parser.parse_args()
    path = checkpoint(options.model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    some = facts(options.data, options.edits)
    edits = [edit_of(one) for one in some]
    text, prompts = paragraphs(options.text / "wikitext2-test.txt"), [one["locality_prompt"] for one in some]
    before = next_tokens(model, tokenizer, text, prompts)
    originals = {name: weight.clone() for name, weight in model.state_dict().items()}
    statistics: dict[tuple[int, ...], Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    search = ValueFinder.find

    def found(finder: ValueFinder, requests: Any) -> Any:
        """Returns the values of the first search with the current hidden states."""
        site = finder._site
        key = (site.projection.layer, len(requests))
        if key not in values:
            values[key] = search(finder, requests)
        _, start = request_keys(site.decoder, [site.projection], requests, output_of=site.module)
        return replace(values[key], start=start)

    rows = []
    for setting in options.settings:
        config = eval(f"dict({setting})", {})
        for name, weight in model.state_dict().items():
            weight.copy_(originals[name])
        with mock.patch.object(ValueFinder, "find", found):
            editor = rf.Editor(
                model, tokenizer, config=rf.EditConfig(**{"batch_size": options.edits, "refine": 0} | config)
            )
            if editor.layers not in statistics:
                valid = GivenTexts(paragraphs(options.text / "wikitext2-valid.txt"))
                statistics[editor.layers] = editor.statistics(valid, tokens=50_000)
            editor.anchor(statistics[editor.layers])
            editor.calibrate(edits)
            began = time.perf_counter()
            records = editor.edit(edits)
            seconds = time.perf_counter() - began
        with quiet(model):
            after = next_tokens(model, tokenizer, text, prompts)
        other = score(model, tokenizer, [(one["rephrase_prompt"], one["target_new"]) for one in some])
        count = len(records)
        rows.append(
            {
                "setting": setting,
                "layers": list(editor.layers),
                "mu": editor.priors[-1].mu,
                "stated": sum(one.success for one in records) / count,
                "nll": sum(one.nll for one in records) / count,
                "realized": sum(one.realized for one in records) / count,
                "paraphrases_stated": sum(one.exact for one in other) / count,
                "paraphrases_nll": sum(one.nll for one in other) / count,
                "kl_text": divergence(before[0], after[0]),
                "kl_neighbors": divergence(before[1], after[1]),
                "neighbors_changed": float((before[1].argmax(-1) != after[1].argmax(-1)).float().mean()),
                "deviation": [round(one.weight, 2) for one in editor.deviation()],
                "seconds_writing": round(seconds, 2),
            }
        )
        print(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in rows[-1].items()},
            flush=True,
        )
    record(
        options.json, "Ways of writing one batch into a real model", model=options.model, edits=options.edits, rows=rows
    )


if __name__ == "__main__":
    main()
