"""Spectral protection: does a penalty on the change in the leading singular directions of W0 preserve the model better?

    python bench/spectral.py smollm2 --data counterfact-10k.json --text DIR --json FILE

`rho^2 ||dW V_r||_F^2` is an exact addition to the anchor moment: `mu^2 M + rho^2 V_r V_r^T`, with the r leading right
singular vectors V_r of W0, or of the keys of text (eigenvectors of M). `rho^2` is given relative to `mu^2` times the
mean diagonal of M. The values of the edits are searched once, in the unedited model. For each prior mu is found by
bisection such that the same fraction of the edits is stated (strict efficacy at the bare prompt, refinement off), and
the model is compared with the unedited one: KL of the next token and perplexity on other text, and specificity.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from real_models import checkpoint
from real_stream import ANCHOR_TOKENS, edit_of, evaluate, facts, paragraphs
from real_writes import divergence, next_tokens
from recording import add_json, record
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlsedit_fast as rf
from rlsedit_fast.editing.keys import request_keys
from rlsedit_fast.editing.objective import measure
from rlsedit_fast.editing.value_search import ValueFinder
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.statistics.sources import GivenTexts

STEPS = 4  # of the bisection in log mu


def protected(moment: Tensor, weight: Tensor, of: str, rank: int, strength: float) -> Tensor:
    """Returns `M + strength * mean diagonal of M * V_r V_r^T`."""
    if not rank:
        return moment
    if of == "weight":
        vectors = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:rank].T
    else:
        vectors = torch.linalg.eigh(moment.double()).eigenvectors[:, -rank:]
    added = strength * float(moment.diagonal().double().mean()) * (vectors @ vectors.T)
    return (moment.double() + 0.5 * (added + added.T)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("smollm2",))
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--stated", type=float, default=0.9, help="strict efficacy at which priors are compared")
    parser.add_argument("--mu", type=float, default=36.4, help="center of the search, as calibrated for adherence 0.8")
    parser.add_argument("--settings", nargs="+", default=["weight,0,0"], metavar="OF,RANK,STRENGTH")
    add_json(parser)
    options = parser.parse_args()
    path = checkpoint(options.model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    some = facts(options.data, options.edits)
    edits = [edit_of(one) for one in some]
    text, prompts = paragraphs(options.text / "wikitext2-test.txt"), [one["locality_prompt"] for one in some]
    before = next_tokens(model, tokenizer, text, prompts)
    specificity = evaluate(model, tokenizer, some)["specificity"]
    originals = {name: weight.clone() for name, weight in model.state_dict().items()}
    base = rf.EditConfig(prior={"mu": options.mu}, contexts={"chat": ()}, refine=0, batch_size=options.edits)
    first = rf.Editor(model, tokenizer, config=base)
    statistics = first.statistics(GivenTexts(paragraphs(options.text / "wikitext2-valid.txt")), tokens=ANCHOR_TOKENS)
    weights = {p.layer: p.blocks[0].clone() for p in first.context.projections}
    with quiet(model):
        requests = first.context.prepare(edits)
        values = first._session.finder.find(requests)

    def found(finder: ValueFinder, some: Any) -> Any:
        """Returns the values with the current hidden states."""
        site = finder._site
        _, start = request_keys(site.decoder, [site.projection], some, output_of=site.module)
        return replace(values, start=start)

    def write(moments: dict[int, Tensor], mu: float) -> tuple[float, rf.Editor]:
        """Writes the edits into the original model and returns the fraction that it states."""
        for name, weight in model.state_dict().items():
            weight.copy_(originals[name])
        # lam follows from the unprotected moment, so that priors differ only by the addition.
        ridge = base.prior.ridge * float(next(iter(statistics.moments.values())).diagonal().double().mean())
        config = base.replace(prior={"mu": mu, "lam": mu * math.sqrt(ridge)})
        with mock.patch.object(ValueFinder, "find", found):
            editor = rf.Editor(model, tokenizer, config=config)
            editor.anchor(replace(statistics, moments=moments, fingerprint=editor.fingerprint()))
            editor.edit(edits)
        with quiet(model):
            rank = measure(editor.context.site, [request.contexts[0] for request in requests]).rank
        return float((rank == 1).float().mean()), editor

    rows = []
    for setting in options.settings:
        of, rank, strength = setting.split(",")
        moments = {
            layer: protected(moment, weights[layer], of, int(rank), float(strength))
            for layer, moment in statistics.moments.items()
        }
        low, high = math.log(options.mu) - 2.5, math.log(options.mu) + 2.5
        for _ in range(STEPS):  # the largest mu that still states the wanted fraction
            middle = (low + high) / 2
            stated, editor = write(moments, math.exp(middle))
            low, high = (middle, high) if stated >= options.stated else (low, middle)
        stated, editor = write(moments, math.exp(low))
        after = next_tokens(model, tokenizer, text, prompts)
        row = {
            "of": of,
            "rank": int(rank),
            "strength": float(strength),
            "mu": math.exp(low),
            "stated": stated,
            "kl_text": divergence(before[:1], after[:1]),
            "kl_prompts": divergence(before[1:], after[1:]),
            "specificity": evaluate(model, tokenizer, some)["specificity"],
            "paraphrases": evaluate(model, tokenizer, some)["generalization"],
            "deviation": [round(one.weight, 2) for one in editor.deviation()],
        }
        rows.append(row)
        print(row, flush=True)
        record(
            options.json,
            "Spectral protection at equal strict efficacy",
            model=options.model,
            edits=options.edits,
            wanted=options.stated,
            specificity_before=specificity,
            rows=rows,
        )


if __name__ == "__main__":
    main()
