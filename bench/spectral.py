"""Spectral protection: is the model preserved better if changes along leading singular directions cost more?

    python bench/spectral.py smollm2 --data counterfact-10k.json --text DIR --json FILE

`rho^2 ||dW V_r||_F^2` is an exact addition to the anchor term: `mu^2 M` becomes `mu^2 M + rho^2 V_r V_r^T`, with the
leading r right singular vectors V_r of W0 (`weight`) or of the keys of text (`keys`, eigenvectors of M). The strength
is `rho^2` relative to `mu^2` times the mean diagonal of M.

One layer is edited, in one batch. Keys and values are computed once, in the unedited model, and the least-squares
problem is solved in float64 for each prior. So that priors are compared at the same success, mu is found by bisection:
the largest one at which the model states the given fraction of the targets (strict efficacy, bare prompts). Reported:
KL(before || after) of the next token on other text and after neighborhood prompts in nats, perplexity, specificity,
generalization and `||W - W0||_F`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from real_models import checkpoint
from real_stream import ANCHOR_TOKENS, edit_of, evaluate, facts, paragraphs, perplexity, stated
from real_writes import divergence, next_tokens
from recording import add_json, record
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlsedit_fast as rf
from rlsedit_fast.editing.rows import row_weights
from rlsedit_fast.statistics.sources import GivenTexts

STEPS = 7  # of the bisection in log mu
SPAN = 2.5  # it searches e^-SPAN to e^SPAN times --mu
SETTINGS = [
    "weight,0,0",
    *(f"weight,{rank},{strength}" for rank in (16, 64, 256) for strength in (1, 10, 100)),
    *(f"keys,{rank},{strength}" for rank in (16, 64) for strength in (10, 100)),
]


def directions(moment: Tensor, weight: Tensor, of: str, rank: int) -> Tensor:
    """Returns the leading directions `V_r [d_k, r]`, float64."""
    if of == "weight":
        return torch.linalg.svd(weight, full_matrices=False).Vh[:rank].T
    return torch.linalg.eigh(moment).eigenvectors[:, len(moment) - rank :]


@torch.no_grad()
def main() -> None:
    """Computes, prints and records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("smollm2", "gemma3-270m"))
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--layer", type=int, default=5)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, metavar="DIR")
    parser.add_argument("--stated", type=float, default=0.95, help="strict efficacy at which priors are compared")
    parser.add_argument("--mu", type=float, default=36.0, help="center of the search")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="OF,RANK,STRENGTH")
    add_json(parser)
    options = parser.parse_args()
    path = checkpoint(options.model)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    some = facts(options.data, options.edits)
    text, prompts = paragraphs(options.text / "wikitext2-test.txt"), [one["locality_prompt"] for one in some]
    before = next_tokens(model, tokenizer, text, prompts)
    unedited = evaluate(model, tokenizer, some) | {"perplexity": perplexity(model, tokenizer, text, 10_240)}

    config = rf.EditConfig(
        layers_to_transform=[options.layer],
        prior={"mu": options.mu},
        contexts={"chat": ()},
        refine=0,
        batch_size=options.edits,
    )
    editor = rf.Editor(model, tokenizer, config=config)
    statistics = editor.statistics(GivenTexts(paragraphs(options.text / "wikitext2-valid.txt")), tokens=ANCHOR_TOKENS)
    editor.anchor(statistics)
    [projection] = editor.context.projections
    parameter = projection.blocks[0]
    original = parameter.clone()
    ids = [one.id for one in editor.edit([edit_of(one) for one in some])]
    rows = editor._session.ledger.rows(ids)
    parameter.copy_(original)
    keys = torch.cat([one.keys[0] for one in rows]).double()
    residual = torch.cat([one.values[0] for one in rows]).double() - keys @ original.double().T
    weights = torch.tensor(row_weights(len(rows[0]), config.contexts.bare_weight)).double().repeat(len(rows))
    moment = statistics.moments[options.layer].double()
    scale = float(moment.diagonal().mean())
    # The default ridge, of the unprotected moment: priors differ only by the addition.
    anchors = moment + config.prior.ridge * scale * torch.eye(len(moment), dtype=torch.float64)
    normal, right = keys.T @ (weights[:, None] * keys), keys.T @ (weights[:, None] * residual)

    def write(added: Tensor, mu: float) -> float:
        """Writes the solution into the original weight and returns the fraction of targets that the model states."""
        change = torch.linalg.solve(mu**2 * (anchors + added) + normal, right)
        parameter.copy_(original + change.T.to(original))
        return stated(model, tokenizer, some)

    found: list[dict[str, Any]] = []
    for setting in options.settings:
        of, rank, strength = setting.split(",")
        leading = directions(moment, original.double(), of, int(rank))
        added = float(strength) * scale * (leading @ leading.T)
        low, high = math.log(options.mu) - SPAN, math.log(options.mu) + SPAN
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if write(added, math.exp(middle)) >= options.stated else (low, middle)
        reached = write(added, math.exp(low))
        change = (parameter - original).double()
        after = next_tokens(model, tokenizer, text, prompts)
        row = {
            "of": of,
            "rank": int(rank),
            "strength": float(strength),
            "mu": math.exp(low),
            "stated": reached,
            "kl_text": divergence(before[:1], after[:1]),
            "kl_neighbors": divergence(before[1:], after[1:]),
            "perplexity": perplexity(model, tokenizer, text, 10_240),
            **{name: value for name, value in evaluate(model, tokenizer, some).items() if name != "efficacy_strict"},
            "change": float(change.norm()),
            "change_along_directions": float((change @ leading).norm()),
        }
        parameter.copy_(original)
        found.append(row)
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
        record(
            options.json,
            "Spectral protection at equal strict efficacy",
            model=options.model,
            edits=options.edits,
            layer=options.layer,
            wanted=options.stated,
            unedited=unedited,
            settings=found,
        )


if __name__ == "__main__":
    main()
