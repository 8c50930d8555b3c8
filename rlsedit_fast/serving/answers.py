"""Counts the targets that a served model states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlsedit_fast.data.edits import Edit
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.tokens import fill
from rlsedit_fast.serving.http import Server

_FEW_TOKENS = 4  # enough for most targets
_MOST_TOKENS = 64


@dataclass(frozen=True)
class StatedReport:
    """Answers of a served model to the prompts of edits.

    Attributes:
        stated: number of edits whose target is at the start of the greedy continuation of the prompt.
        asked: number of edits.
        answers: the continuations, in the order of the edits.
        unstated: positions of the edits whose target is not stated.

    Example:
        >>> from rlsedit_fast.serving import StatedReport
        >>> StatedReport(stated=1, asked=2, answers=(" Lyon", " Paris"), unstated=(1,)).unstated
        (1,)
    """

    stated: int
    asked: int
    answers: tuple[str, ...]
    unstated: tuple[int, ...]


def count_stated(server: Server, edits: Sequence[Edit], *, model: str | None = None) -> StatedReport:
    """Asks a server the prompts of edits, greedily.

    Args:
        server: the server.
        edits: the edits, at least one.
        model: name of a served model or adapter; by default the base model.

    Returns:
        The number of stated targets, and all answers.

    Raises:
        InputError: there are no edits, or some are conversations.
        ServerError: the server cannot be reached, or refused the request.

    Example:
        >>> from rlsedit_fast import Edit
        >>> from rlsedit_fast.serving import VLLM, count_stated
        >>> report = count_stated(VLLM(), [Edit("{} lives in", "Ann", "Rome")])  # doctest: +SKIP
    """
    if chats := sum(edit.messages is not None for edit in edits):
        raise InputError(
            f"{chats} of {len(edits)} edits are conversations, whose chat template the server applies and this client "
            "does not know; pass the other edits"
        )
    prompts = [fill(edit.prompt, edit.subject)[0] for edit in edits]
    targets = [edit.target.strip() for edit in edits]
    answers = [answer.text for answer in server.complete(prompts, model=model, max_tokens=_FEW_TOKENS)]
    # Answers that are the start of the target are asked again with a token for each byte.
    short = [
        at for at, target in enumerate(targets) if target != (said := answers[at].lstrip()) and target.startswith(said)
    ]
    if short:
        longest = max(len(targets[at].encode()) for at in short)
        longer = server.complete([prompts[at] for at in short], model=model, max_tokens=min(longest + 1, _MOST_TOKENS))
        for at, answer in zip(short, longer, strict=True):
            answers[at] = answer.text
    unstated = tuple(at for at, target in enumerate(targets) if not answers[at].lstrip().startswith(target))
    return StatedReport(len(edits) - len(unstated), len(edits), tuple(answers), unstated)
