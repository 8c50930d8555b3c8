"""Capability: GLUE and MMLU items answered by likelihood, with standard errors."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.scoring import score_rows
from rlsedit_fast.models.tokens import Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEAST_ITEMS = 500
"""Of a figure; with fewer the standard error is above two points, and the figure is marked."""


@dataclass(frozen=True)
class Item:
    """A prompt, what may follow it, and which of these is right."""

    prompt: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class TaskResult:
    """One task.

    Attributes:
        accuracy: share of items whose right choice has the lowest mean NLL per token; a tie is wrong.
        error: its standard error, `sqrt(p (1 - p) / n)`.
        items: n.
        few: whether that is fewer than `LEAST_ITEMS`.
        cut: how many prompts were too long for the model and lost their beginning.
    """

    accuracy: float
    error: float
    items: int
    few: bool
    cut: int


def _pair(question: str) -> Callable[[dict[str, Any]], tuple[str, tuple[str, ...], int]]:
    def item(record: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
        label = record["label"]
        right = {"entailment": 1, "not_entailment": 0}[label] if isinstance(label, str) else int(label)
        return f"{record['sentence1']}\n{record['sentence2']}\n{question}", ("no", "yes"), right

    return item


def _rte(record: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    prompt, choices, label = _pair("Question: does the first text entail the second? Answer:")(record)
    return prompt, choices, 1 - label


def _mmlu(record: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    return f"Question: {record['question']}\nAnswer:", tuple(map(str, record["choices"])), int(record["answer"])


TASKS: dict[str, Callable[[dict[str, Any]], tuple[str, tuple[str, ...], int]]] = {
    "sst2": lambda r: (f"Review: {r['sentence']}\nSentiment:", ("negative", "positive"), int(r["label"])),
    "cola": lambda r: (f"Sentence: {r['sentence']}\nIs it grammatical? Answer:", ("no", "yes"), int(r["label"])),
    "mrpc": _pair("Question: do both sentences say the same? Answer:"),
    "rte": _rte,
    "nli": _pair("Question: does the first text entail the second? Answer:"),
    "mmlu": _mmlu,
}
"""By the name of their file, `NAME.jsonl`. GLUE's RTE has 0 for entailment, its other pairs 1 for yes."""


def read_task(name: str, path: Path, *, items: int | None = None, seed: int = 0) -> list[Item]:
    """Items of a task, all or a random choice of them.

    Raises:
        InputError: no such task, or a file that cannot be read as its records.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    try:
        # Not splitlines(): JSON texts may contain U+2028 and its like.
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = [Item(*TASKS[name](json.loads(line))) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as records of {name!r}, a JSON object a line ({error})") from error
    if not found:
        raise InputError(f"{path}: no record in it")
    random.Random(seed).shuffle(found)
    return found[:items]


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> TaskResult:
    """Answers each item with the choice of the lowest mean NLL per token, as likelihood scoring does (Brown et al.
    2020, arXiv 2005.14165, sec. 2.4; `lm-eval` calls it `acc_norm`, by bytes there).

    A prompt that is too long for the model loses its beginning, behind the beginning-of-text token.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows, cut = [], 0
    for item in items:
        made = [encode_plain(tokenizer, item.prompt, choice) for choice in item.choices]
        over = max(len(row.ids) for row in made) - (longest or math.inf)
        cut += over > 0
        rows += [_shortened(row, int(over), tokenizer.bos_token_id) if over > 0 else row for row in made]
    scores = iter(score_rows(model, rows))
    right = 0
    for item in items:
        nll = [next(scores).nll for _ in item.choices]
        right += all(nll[item.right] < other for at, other in enumerate(nll) if at != item.right)
    share = right / len(items)
    error = math.sqrt(share * (1 - share) / len(items))
    return TaskResult(share, error, len(items), len(items) < LEAST_ITEMS, cut)


def _shortened(row: Row, over: int, bos: int | None) -> Row:
    keep = 1 if bos is not None and row.ids[0] == bos else 0
    return Row(row.ids[:keep] + row.ids[keep + over :], -1, row.prompt_length - over)
