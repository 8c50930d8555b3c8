"""Free generation: continuations, exact-match answers, and fluency."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import MultiHop
from rlsedit_fast.evaluation.scoring import Progress, Score
from rlsedit_fast.models.generation import batches, end_tokens, greedy
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import pad_left
from rlsedit_fast.models.projections import input_device
from rlsedit_fast.models.tokens import Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOPS = (".", "\n", "<|endoftext|>")
"""Strings at which an answer ends, in addition to the end-of-text tokens of the model."""

_AT_ONCE = 128
_BEYOND = 2  # tokens generated after an answer, to detect that it continues, for example with ". 5"
_WORD = re.compile(r"\w+|[^\w\s]")


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int,
    top_k: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """Continues prompts greedily, or by sampling from the `top_k` most likely tokens.

    Greedy decoding uses only the end-of-text tokens of the generation config; sampling uses all of it, like
    `generate()`. Prompts of different lengths are padded on the left if the model supports it. The global random number
    generators are restored.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        prompts: prompts of at least one token.
        tokens: maximum number of new tokens.
        top_k: number of tokens to sample from; None for greedy decoding.
        seed: random seed of the sampling.
        progress: called after each batch with the number of finished prompts and the number of prompts.

    Returns:
        The continuation of each prompt, without special tokens.

    Example:
        >>> from rlsedit_fast.evaluation import continuations
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> continuations(model, tokenizer, ["Toze Lado Rekuno plays the"], tokens=2)
        ['clarinet .']
    """
    rows = [encode_plain(tokenizer, prompt).ids for prompt in prompts]
    if top_k is None:
        new = greedy(model, rows, [tokens] * len(rows), ends=end_tokens(model, tokenizer), progress=progress)
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in new]
    device = input_device(model)
    generator: Any = model  # PreTrainedModel has no generate() in the type stubs of transformers
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    texts: dict[int, str] = {}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), quiet(model), torch.inference_mode():
        torch.manual_seed(seed)
        for _, part in batches(model, [len(row) for row in rows], _AT_ONCE):
            ids, mask = pad_left([rows[i] for i in part], device)
            sampled = generator.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                pad_token_id=padding,
                do_sample=True,
                top_k=top_k,
            )
            for i, row in zip(part, sampled[:, ids.shape[1] :].tolist(), strict=True):
                texts[i] = str(tokenizer.decode(row, skip_special_tokens=True))
            if progress is not None:
                progress(len(texts), len(rows))
    return [texts[i] for i in range(len(rows))]


def matches_answer(text: str, answer: str) -> bool:
    """Returns whether a continuation is the answer and then ends.

    This is exact match with natural stopping, one of the two measures of The Mirage of Model Editing (Yang et al. 2025,
    arXiv 2502.11177); their other measure, a model as judge, is not implemented. Whitespace around the answer is
    ignored. Letter case is compared, unlike in their release. A period within a number (3.5) is not an end; a period
    after an abbreviation ("St. Petersburg" for "St") is.

    Args:
        text: the continuation.
        answer: the correct answer.

    Example:
        >>> from rlsedit_fast.evaluation import matches_answer
        >>> matches_answer(" Lyon. The city", "Lyon"), matches_answer(" Lyon and Paris", "Lyon")
        (True, False)
    """
    found, wanted = text.strip(), answer.strip()
    if not found.startswith(wanted):
        return False
    rest = found[len(wanted) :].lstrip(" ")
    ends = [stop for stop in STOPS if rest.startswith(stop)]
    return not rest or any(stop != "." or not rest[1:2].isdecimal() for stop in ends)


def free_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    *,
    known: Mapping[tuple[str, str], Score] | None = None,
    progress: Progress | None = None,
) -> list[bool]:
    """Returns, for each question, whether the greedy continuation of the prompt is the answer.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        questions: pairs (prompt, answer).
        known: see `free_answers`.
        progress: see `free_answers`.

    Returns:
        One value per question, see `matches_answer`.

    Example:
        >>> from rlsedit_fast.evaluation import free_accuracy
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> prompt = "Toze Lado Rekuno plays the"
        >>> free_accuracy(model, tokenizer, [(prompt, "clarinet"), (prompt, "harp")])
        [True, False]
    """
    return free_answers(model, tokenizer, [(prompt, (answer,)) for prompt, answer in questions], known, progress)


def free_multihop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chains: Sequence[MultiHop],
    *,
    known: Mapping[tuple[str, str], Score] | None = None,
    progress: Progress | None = None,
) -> list[bool]:
    """Returns, for each multi-hop question, whether any wording is continued greedily by a correct answer.

    This is the multi-hop accuracy of MQuAKE with free generation, see `rlsedit_fast.evaluation.metrics`.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        chains: the multi-hop questions.
        known: see `free_answers`.
        progress: see `free_answers`.

    Returns:
        One value per chain, see `matches_answer`.
    """
    questions = [(prompt, chain.correct_answers) for chain in chains for prompt in chain.prompts]
    matched = iter(free_answers(model, tokenizer, questions, known, progress))
    return [any([next(matched) for _ in chain.prompts]) for chain in chains]


def free_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, Sequence[str]]],
    known: Mapping[tuple[str, str], Score] | None = None,
    progress: Progress | None = None,
) -> list[bool]:
    """Returns, for each prompt, whether its greedy continuation is one of the correct answers.

    Two tokens more than the longest answer are generated, or fewer if they already decide the result. Known scores give
    the first tokens: the tokens ranked first at the positions of an answer are the greedy continuation up to the first
    one that differs from the answer. They decide most incorrect continuations without a forward pass.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        questions: pairs (prompt, correct answers), with at least one answer each.
        known: scores of this model by (prompt, answer), for any of the questions.
        progress: called after each batch with the number of finished prompts and the number of prompts.

    Returns:
        One value per prompt, see `matches_answer`.
    """
    known = {} if known is None else known
    ends = end_tokens(model, tokenizer)
    longest, begun, prompts = 0, list[list[int]](), list[list[int]]()
    for prompt, answers in questions:
        rows = {answer: encode_plain(tokenizer, prompt, answer) for answer in answers}
        longest = max(longest, *(len(row.target) for row in rows.values()))
        first = [_first_tokens(known[prompt, answer], row) for answer, row in rows.items() if (prompt, answer) in known]
        ids = max(first, key=len, default=[])
        begun.append(ids[: next((at for at, token in enumerate(ids) if token in ends), None)])
        row = next(iter(rows.values()))
        prompts.append(row.ids[: row.prompt_length])

    def text(at: int, new: Sequence[int]) -> str:
        return str(tokenizer.decode([*begun[at], *new], skip_special_tokens=True))

    def decided(at: int, new: Sequence[int]) -> bool:
        return not any(_may_match(text(at, new), answer) for answer in questions[at][1])

    undecided = [at for at in range(len(questions)) if not decided(at, ())]

    def report(done: int, _total: int = 0) -> None:
        if progress is not None:
            progress(len(questions) - len(undecided) + done, len(questions))

    report(0)
    generated = greedy(
        model,
        [prompts[at] + begun[at] for at in undecided],
        [longest + _BEYOND - len(begun[at]) for at in undecided],
        ends=ends,
        enough=lambda i, new: decided(undecided[i], new),
        progress=report,
    )
    rest = dict(zip(undecided, generated, strict=True))
    return [
        any(matches_answer(text(at, rest.get(at, ())), answer) for answer in answers)
        for at, (_, answers) in enumerate(questions)
    ]


def _first_tokens(score: Score, row: Row) -> list[int]:
    """Returns the first tokens of the greedy continuation of a row's prompt, from the score of its target."""
    same = [one == wanted for one, wanted in zip(score.predicted, row.target, strict=True)]
    return list(score.predicted[: same.index(False) + 1 if False in same else len(same)])


def _may_match(text: str, answer: str) -> bool:
    """Returns whether a continuation that begins with `text` can still match the answer, see `matches_answer`."""
    found, wanted = text.rstrip("\ufffd").strip(), answer.strip()  # without an incomplete character
    if not found.startswith(wanted):
        return wanted.startswith(found)
    rest = found[len(wanted) :].lstrip(" ")
    return any(stop.startswith(rest) for stop in STOPS)


def n_gram_entropy(text: str) -> float:
    """Computes the weighted mean of the entropies of the 2-grams and 3-grams of words, `(2/3 H_2 + 4/3 H_3) / 2`.

    This is the fluency of ROME (Meng et al. 2022, arXiv 2202.05262, sec. 3.3, after Zhang et al. 2018); repetitive text
    has a low value. Words and punctuation marks are split by a regular expression, by NLTK in their release.

    Args:
        text: text of at least three words.

    Returns:
        The entropy in bits.

    Raises:
        InputError: the text has fewer than three words.

    Example:
        >>> from rlsedit_fast.evaluation import n_gram_entropy
        >>> round(n_gram_entropy("a b c d e"), 3), round(n_gram_entropy("a b a b a"), 3)
        (1.723, 0.946)
    """
    words = _WORD.findall(text)
    if len(words) < 3:
        raise InputError(f"text has {len(words)} words; expected at least 3, for its 3-grams")
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def fluency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tokens: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Measures fluency: the mean `n_gram_entropy` of sampled texts, prompts included.

    Texts are sampled from the five most likely tokens. A text of fewer than three words has entropy 0. The release of
    ROME includes the prompt in its 100 tokens and reports 100 times the value.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        prompts: prompts, at least one.
        tokens: maximum number of new tokens per text.
        seed: random seed of the sampling.
        progress: called after each batch with the number of finished texts and the number of texts.

    Returns:
        The mean entropy in bits.
    """
    texts = continuations(model, tokenizer, prompts, tokens=tokens, top_k=5, seed=seed, progress=progress)
    whole = [f"{prompt} {text}" for prompt, text in zip(prompts, texts, strict=True)]
    return sum(n_gram_entropy(text) if len(_WORD.findall(text)) >= 3 else 0.0 for text in whole) / len(whole)
