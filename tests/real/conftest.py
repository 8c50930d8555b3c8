"""Checkpoints of real pre-trained models, facts to edit, and scores computed independently of the package."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import real_models
import torch

import rlsedit_fast as rf

DATA = Path(os.environ.get("RLSEDIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
ANCHOR_CHARACTERS = 80_000  # about 20,000 tokens of English
LOGITS_AT_ONCE = 1 << 26  # 256 MB

PARAGRAPH = (
    "The river rises in the hills to the north of the town and flows through a wide valley before it reaches the sea. "
    "For many centuries the people of the valley have grown wheat, raised sheep, and traded with the ports along the "
    "coast. In the spring the snow on the mountains melts and the water often covers the lower fields, so most of the "
    "villages were built on higher ground. A stone bridge from the fourteenth century still carries the main road "
    "across the river. When the railway came, the old market lost much of its importance, and a number of young people "
    "moved to the city to look for work in the factories. Today the valley is known for its cheese, its quiet walking "
    "paths, and a small museum that tells the history of the region."
)


def build(name: str) -> Path:
    try:
        return real_models.checkpoint(name)
    except real_models.MissingPackage as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2 135M Instruct; tests that use it are marked `smollm2`."""
    return build("smollm2")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma 3 270M, pre-trained; tests that use it are marked `real`."""
    return build("gemma3-270m")


@pytest.fixture(scope="session")
def load() -> Callable:
    """Returns a function that loads model and tokenizer of a checkpoint with transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return lambda path: (AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))


@pytest.fixture(scope="session")
def paragraph() -> str:
    """English text that is in no training data."""
    return PARAGRAPH


@pytest.fixture(scope="session")
def anchor_texts(paragraph) -> list[str]:
    """Lines of running text of about 20,000 tokens; only a paragraph if the data set is missing."""
    path = DATA / "wikitext2-valid.txt"
    if not path.is_file():
        return [paragraph]
    text = path.read_text(encoding="utf-8")[:ANCHOR_CHARACTERS]
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Fact:
    """A record of CounterFact. `neighborhood` has pairs of a prompt and its true answer."""

    edit: rf.Edit
    true: str
    paraphrases: tuple[str, ...]
    neighborhood: tuple[tuple[str, str], ...]

    @property
    def prompt(self) -> str:
        return self.edit.prompt.replace("{}", self.edit.subject)


@pytest.fixture(scope="session")
def counterfact() -> Callable[..., list[Fact]]:
    """`counterfact(n, start=0)`: n records of CounterFact in the order of the file."""
    path = DATA / "counterfact-10k.json"
    if not path.is_file():
        pytest.skip(f"no data in {DATA}; set RLSEDIT_DATA to its folder")
    records = json.loads(path.read_text(encoding="utf-8"))

    def take(n: int, start: int = 0) -> list[Fact]:
        assert start + n <= len(records)
        return [
            Fact(
                edit=rf.Edit(
                    record["prompt"].replace(record["subject"], "{}", 1), record["subject"], record["target_new"]
                ),
                true=record["ground_truth"],
                paraphrases=(record["rephrase_prompt"],),
                neighborhood=((record["locality_prompt"], record["locality_ground_truth"]),),
            )
            for record in records[start : start + n]
        ]

    return take


@dataclass(frozen=True)
class Score:
    """Scores of the target tokens after a prompt, each computed after the preceding target tokens.

    Attributes:
        nlls: negative log-likelihood of each target token, in nats.
        ranks: rank of each target token; 1 is first.
    """

    nlls: tuple[float, ...]
    ranks: tuple[int, ...]

    @property
    def nll(self) -> float:
        """The mean negative log-likelihood of the target tokens."""
        return sum(self.nlls) / len(self.nlls)

    @property
    def first(self) -> bool:
        """Whether every token of the target is ranked first."""
        return max(self.ranks) == 1


@pytest.fixture(scope="session")
def scores() -> Callable[..., list[Score]]:
    """`scores(model, tokenizer, pairs)` for pairs of a prompt and a target without the space between them."""
    return compute_scores


@torch.no_grad()
def compute_scores(model, tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Score]:
    rows = []
    for prompt, target in pairs:
        encoded = tokenizer(f"{prompt} {target}", return_offsets_mapping=True)
        start = next(at for at, (_, end) in enumerate(encoded.offset_mapping) if end > len(prompt))
        rows.append((encoded.input_ids, start))
    found: dict[int, Score] = {}
    remaining = sorted(range(len(rows)), key=lambda at: len(rows[at][0]))
    while remaining:
        length = len(rows[remaining[-1]][0])
        count = max(1, LOGITS_AT_ONCE // (length * model.config.vocab_size))
        remaining, batch = remaining[:-count], remaining[-count:]
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, at in enumerate(batch):  # right padding does not affect the other tokens
            size = len(rows[at][0])
            ids[line, :size], mask[line, :size] = torch.tensor(rows[at][0]), 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.float().cpu()
        for line, at in enumerate(batch):
            tokens, start = rows[at]
            target_ids = torch.tensor(tokens[start:])[:, None]
            predicted = logits[line, start - 1 : len(tokens) - 1]
            target_logits = predicted.gather(1, target_ids)
            nlls = (predicted.logsumexp(1, keepdim=True) - target_logits).flatten()
            # Includes the token itself, and tokens with the same logit: a tie is not ranked first.
            ranks = (predicted >= target_logits).sum(1)
            found[at] = Score(tuple(nlls.tolist()), tuple(ranks.tolist()))
    return [found[at] for at in range(len(rows))]
