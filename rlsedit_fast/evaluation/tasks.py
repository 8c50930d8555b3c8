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
from rlsedit_fast.evaluation.scoring import Progress, score_rows
from rlsedit_fast.models.tokens import Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        items: n, of those that could be asked.
        cut: how many prompts were too long for the model and lost their beginning.
        left_out: items with an answer that leaves the model no room for any of the prompt.
    """

    accuracy: float
    error: float
    items: int
    cut: int
    left_out: int


def _pair(question: str) -> Callable[[dict[str, Any]], tuple[str, tuple[str, ...], int]]:
    def item(record: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
        label = record["label"]
        right = {"entailment": 1, "not_entailment": 0}[label] if isinstance(label, str) else int(label)
        return f"{record['sentence1']}\n{record['sentence2']}\n{question}", ("no", "yes"), right

    return item


def _rte(record: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
    prompt, choices, label = _pair("Question: does the first text entail the second? Answer:")(record)
    return prompt, choices, label if isinstance(record["label"], str) else 1 - label


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
"""By the name of their file, `NAME.jsonl`. GLUE's RTE has 0 for entailment, its other pairs 1 for yes; in words they
agree."""


def read_task(name: str, path: Path, *, items: int | None = None, seed: int = 0) -> list[Item]:
    """Items of a task, all or a random choice of them.

    Raises:
        InputError: no such task, or a file that cannot be read as its records.
    """
    if name not in TASKS:
        raise InputError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    try:
        # Not splitlines(): JSON texts may contain U+2028 and its like.
        lines = [(at, line) for at, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if line.strip()]
        found = [Item(*TASKS[name](json.loads(line))) for _, line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as records of {name!r}, a JSON object a line ({error})") from error
    if not found:
        raise InputError(f"{path}: no record in it")
    for (at, _), item in zip(lines, found, strict=True):
        if not 0 <= item.right < len(item.choices) or not all(choice.strip() for choice in item.choices):
            raise InputError(
                f"{path}:{at}: label {item.right} of {len(item.choices)} choices: expected the place of the right one, "
                "from 0, and no blank choice; files without labels cannot be graded"
            )
    random.Random(seed).shuffle(found)
    return found[:items]


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    progress: Progress | None = None,
) -> TaskResult:
    """Answers each item with the choice of the lowest mean NLL per token, as likelihood scoring does (Brown et al.
    2020, arXiv 2005.14165, sec. 2.4; `lm-eval` calls it `acc_norm`, by bytes there).

    A prompt that is too long for the model loses its beginning, behind the beginning-of-text token.

    Raises:
        InputError: every item has an answer that is too long for the model.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    rows, asked, cut = [], list[Item](), 0
    for item in items:
        made = [encode_plain(tokenizer, item.prompt, choice) for choice in item.choices]
        over = int(max(0, max(len(row.ids) for row in made) - longest))
        if any(row.prompt_length - over <= _lead(row, tokenizer.bos_token_id) for row in made):
            continue
        cut += over > 0
        asked.append(item)
        rows += [_shortened(row, over, tokenizer.bos_token_id) for row in made]
    if not asked:
        raise InputError(f"the answers of all {len(items)} items are longer than the model's {longest} tokens")
    scores = iter(score_rows(model, rows, progress=progress))
    right = 0
    for item in asked:
        nll = [next(scores).nll for _ in item.choices]
        right += all(nll[item.right] < other for at, other in enumerate(nll) if at != item.right)
    share = right / len(asked)
    error = math.sqrt(share * (1 - share) / len(asked))
    return TaskResult(share, error, len(asked), cut, len(items) - len(asked))


def _lead(row: Row, bos: int | None) -> int:
    """Tokens before the text."""
    return int(bos is not None and row.ids[0] == bos)


def _shortened(row: Row, over: int, bos: int | None) -> Row:
    keep = _lead(row, bos)
    return Row(row.ids[:keep] + row.ids[keep + over :], -1, row.prompt_length - over)
