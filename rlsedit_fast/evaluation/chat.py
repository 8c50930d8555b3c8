"""Evaluation in a chat: the prompt as the start of an answer, questions answered freely, and neighbors.

An instruct model is asked in its chat format. `start`: the message of the user is the edited prompt, the answer repeats
it, and every token of the target is ranked first after it. `question`: a message asks for the fact in words that no
edit is searched with, and the greedy answer contains the target, ignoring case, within `ANSWER_TOKENS` tokens.
`neighbors`: the message is a neighborhood prompt, the answer repeats it, and its most likely next token is that of the
unedited model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.outcome import Share
from rlsedit_fast.evaluation.scoring import Progress, score_rows
from rlsedit_fast.models.answers import chat_answers, chat_fact, chat_row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWER_TOKENS = 20
"""Maximum number of tokens of the answer to a question.

Example:
    >>> from rlsedit_fast.evaluation import ANSWER_TOKENS
    >>> ANSWER_TOKENS
    20
"""


@dataclass(frozen=True)
class ChatOutcome:
    """Metrics of edits in a chat, see the module.

    Attributes:
        start: edited prompts, as the start of the answer.
        question: questions whose answers contain the target.
        neighbors: neighborhood prompts with the same next token as before the edits.
        answers: the questions, the targets and the answers.

    Example:
        >>> from rlsedit_fast.evaluation import ChatOutcome, Share
        >>> ChatOutcome(Share(1, 1), Share(1, 2), Share(3, 3), ()).question.count
        1
    """

    start: Share
    question: Share
    neighbors: Share
    answers: tuple[tuple[str, str, str], ...]

    def figures(self) -> tuple[tuple[str, str, Share], ...]:
        """Returns the metrics as in result files: name, form and value."""
        return (
            ("chat_start", "strict", self.start),
            ("chat_question", "free", self.question),
            ("chat_neighbors", "strict", self.neighbors),
        )


def contains_answer(text: str, answer: str) -> bool:
    """Returns whether a text contains an answer as whole words, ignoring case.

    Example:
        >>> from rlsedit_fast.evaluation import contains_answer
        >>> contains_answer("It is lyon.", "Lyon"), contains_answer("The Lyonnais", "Lyon")
        (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(answer.strip().casefold())}(?!\w)", text.casefold()) is not None


def chat_neighbors(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    *,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Returns the most likely next token after each neighborhood prompt as the start of an answer, by prompt.

    Args:
        model: causal language model.
        tokenizer: tokenizer for which `models.supports_chat` is True.
        cases: the cases.
        progress: called after each batch with the number of finished prompts and the number of prompts.

    Example:
        >>> from rlsedit_fast.evaluation import chat_neighbors, world_cases
        >>> from rlsedit_fast.world import World, load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> tokenizer.chat_template = "{{ messages[0].content }} . "
        >>> cases = world_cases(World.generate(), 2, seed=0)
        >>> prompts = {question.prompt for case in cases for question in case.neighbors}
        >>> chat_neighbors(model, tokenizer, cases).keys() == prompts
        True
    """
    prompts = list(dict.fromkeys(question.prompt for case in cases for question in case.neighbors))
    found = score_rows(model, [chat_row(tokenizer, prompt, "a") for prompt in prompts], progress=progress)
    return {prompt: one.predicted[0] for prompt, one in zip(prompts, found, strict=True)}


def evaluate_chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    before: Mapping[str, int],
    *,
    progress: Progress | None = None,
) -> ChatOutcome:
    """Computes the metrics of an edited model in a chat.

    Args:
        model: the edited model.
        tokenizer: tokenizer for which `models.supports_chat` is True.
        cases: the cases. `Case.asked` has the questions.
        before: the result of `chat_neighbors` for the unedited model.
        progress: called after each batch of scored prompts with the number of finished prompts and their number.

    Returns:
        The metrics.

    Example:
        >>> from rlsedit_fast.evaluation import chat_neighbors, evaluate_chat, world_cases
        >>> from rlsedit_fast.world import World, load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> tokenizer.chat_template = "{{ messages[0].content }} . "
        >>> cases = world_cases(World.generate(), 2, seed=0)
        >>> before = chat_neighbors(model, tokenizer, cases)
        >>> outcome = evaluate_chat(model, tokenizer, cases, before)
        >>> outcome.start, outcome.question  # the model is not edited, and these cases have no questions
        (Share(count=0, of=2), Share(count=0, of=0))
    """
    started = score_rows(model, [chat_fact(tokenizer, case.edit) for case in cases], progress=progress)
    after = chat_neighbors(model, tokenizer, cases, progress=progress)
    asked = [(question, case.edit.target) for case in cases for question in case.asked]
    answers = chat_answers(model, tokenizer, [question for question, _ in asked], tokens=ANSWER_TOKENS)
    given = tuple((question, target, answer) for (question, target), answer in zip(asked, answers, strict=True))
    return ChatOutcome(
        Share(sum(one.exact for one in started), len(started)),
        Share(sum(contains_answer(answer, target) for _, target, answer in given), len(given)),
        Share(sum(before[prompt] == token for prompt, token in after.items()), len(after)),
        given,
    )
