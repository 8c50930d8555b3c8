"""Tasks of GLUE and MMLU, scored by the likelihood of the choices, with standard errors."""

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
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.models.tokens import Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Item:
    r"""A multiple-choice question.

    Attributes:
        prompt: the prompt.
        choices: continuations of the prompt.
        correct: index of the correct choice.

    Example:
        >>> from rlsedit_fast.evaluation import Item
        >>> item = Item("Review: good\nSentiment:", ("negative", "positive"), 1)
        >>> item.choices[item.correct]
        'positive'
    """

    prompt: str
    choices: tuple[str, ...]
    correct: int


@dataclass(frozen=True)
class TaskResult:
    """Result of one task.

    Attributes:
        accuracy: fraction of items whose correct choice has the lowest mean NLL per token; ties are wrong.
        error: standard error of the accuracy, `sqrt(p (1 - p) / n)`.
        items: number n of evaluated items.
        truncated: number of items whose prompt was too long for the model and was truncated at its beginning.
        skipped: number of items with a choice so long that the prompt does not fit into the model's context.

    Example:
        >>> from rlsedit_fast.evaluation import TaskResult
        >>> TaskResult(accuracy=0.5, error=0.05, items=100, truncated=0, skipped=0).accuracy
        0.5
    """

    accuracy: float
    error: float
    items: int
    truncated: int
    skipped: int


def _pair(question: str) -> Callable[[dict[str, Any]], tuple[str, tuple[str, ...], int]]:
    def item(record: dict[str, Any]) -> tuple[str, tuple[str, ...], int]:
        label = record["label"]
        correct = {"entailment": 1, "not_entailment": 0}[label] if isinstance(label, str) else int(label)
        return f"{record['sentence1']}\n{record['sentence2']}\n{question}", ("no", "yes"), correct

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
"""Functions from a record to `(prompt, choices, index of the correct choice)`, by the name of the task and its file.

The label 0 of RTE in GLUE means entailment; in the other pair tasks 1 means yes. Labels in words are unambiguous.
"""


def read_task(name: str, path: Path, *, items: int | None = None, seed: int = 0) -> list[Item]:
    r"""Reads the items of a task, in random order.

    Args:
        name: name of the task, one of `TASKS`.
        path: JSON Lines file of its records.
        items: maximum number of items; None for all.
        seed: random seed of the order.

    Returns:
        The items.

    Raises:
        InputError: the task is unknown, or the file cannot be read or has another format.

    Example:
        >>> import pathlib, tempfile
        >>> from rlsedit_fast.evaluation import read_task
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "sst2.jsonl")
        ...     _ = path.write_text('{"sentence": "good", "label": 1}')
        ...     read_task("sst2", path)
        [Item(prompt='Review: good\nSentiment:', choices=('negative', 'positive'), correct=1)]
    """
    if name not in TASKS:
        raise InputError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    try:
        # Not splitlines(): JSON strings can contain other line separators, such as U+2028.
        lines = [(at, line) for at, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1) if line.strip()]
        found = [Item(*TASKS[name](json.loads(line))) for _, line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: cannot be read as records of {name!r} ({error}); expected one JSON object per line"
        ) from error
    if not found:
        raise InputError(f"{path}: no records; expected one JSON object per line")
    for (at, _), item in zip(lines, found, strict=True):
        if not 0 <= item.correct < len(item.choices) or not all(choice.strip() for choice in item.choices):
            raise InputError(
                f"{path}:{at}: label {item.correct} of {len(item.choices)} choices: expected the index of the correct "
                "choice, from 0, and no blank choice; use a file with labels"
            )
    random.Random(seed).shuffle(found)
    return found[:items]


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    *,
    progress: Progress | None = None,
) -> TaskResult:
    """Answers each item with the choice that has the lowest mean NLL per token.

    This is the scoring of Brown et al. (2020, arXiv 2005.14165, sec. 2.4); `acc_norm` of `lm-eval` divides by bytes
    instead of tokens. A prompt that is too long for the model is truncated after its beginning-of-text token.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        items: the items.
        progress: called after each batch with the number of finished choices and the number of choices.

    Returns:
        The accuracy with its standard error.

    Raises:
        InputError: every item has a choice that is too long for the model.

    Example:
        >>> from rlsedit_fast.evaluation import Item, evaluate_task
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> evaluate_task(model, tokenizer, [Item("Toze Lado Rekuno plays the", ("harp", "clarinet"), 1)])
        TaskResult(accuracy=1.0, error=0.0, items=1, truncated=0, skipped=0)
    """
    longest = max_tokens(model.config) or math.inf
    rows, used, truncated = [], list[Item](), 0
    for item in items:
        encoded = [encode_plain(tokenizer, item.prompt, choice) for choice in item.choices]
        over = int(max(0, max(len(row.ids) for row in encoded) - longest))
        if any(row.prompt_length - over <= _lead(row, tokenizer.bos_token_id) for row in encoded):
            continue
        truncated += over > 0
        used.append(item)
        rows += [_truncated(row, over, tokenizer.bos_token_id) for row in encoded]
    if not used:
        raise InputError(
            f"with the choices of all {len(items)} items, no prompt fits into the {longest} tokens of the model; use "
            "shorter choices"
        )
    scores = iter(score_rows(model, rows, progress=progress))
    right = 0
    for item in used:
        nll = [next(scores).nll for _ in item.choices]
        right += all(nll[item.correct] < other for at, other in enumerate(nll) if at != item.correct)
    accuracy = right / len(used)
    error = math.sqrt(accuracy * (1 - accuracy) / len(used))
    return TaskResult(accuracy, error, len(used), truncated, len(items) - len(used))


def _lead(row: Row, bos: int | None) -> int:
    """Returns the number of tokens before the text."""
    return int(bos is not None and row.ids[0] == bos)


def _truncated(row: Row, over: int, bos: int | None) -> Row:
    keep = _lead(row, bos)
    return Row(row.ids[:keep] + row.ids[keep + over :], -1, row.prompt_length - over)
