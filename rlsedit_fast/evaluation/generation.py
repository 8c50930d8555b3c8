"""What a model says by itself: free answers, and how much its running text repeats itself."""

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
"""Where an answer naturally ends, beside the model's own end of text."""

_AT_ONCE = 128
_BEYOND = 2  # tokens after an answer's own, or one that goes on would pass for one that ended: ". 5", say
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
    """What follows each prompt: greedily, or sampled from the `top_k` likeliest tokens.

    Greedily it is the likeliest token at each step, whatever the model's own generation settings are; what is sampled
    obeys them, as `generate()` does. Prompts of several lengths go through together, padded on the left, where the
    model bears that. No other random number generator is touched.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: at least a token each.
        tokens: most new tokens.
        top_k: sample from this many; None is greedy.
        seed: of the sampling.
        progress: called after each batch with the prompts done so far.
    """
    rows = [encode_plain(tokenizer, prompt).ids for prompt in prompts]
    if top_k is None:
        made = greedy(model, rows, [tokens] * len(rows), ends=end_tokens(model, tokenizer), progress=progress)
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in made]
    device = input_device(model)
    generator: Any = model  # the stubs of transformers do not know generate() on what AutoModel gives
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    said: dict[int, str] = {}
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
                said[i] = str(tokenizer.decode(row, skip_special_tokens=True))
            if progress is not None:
                progress(len(said), len(rows))
    return [said[i] for i in range(len(rows))]


def says(text: str, answer: str) -> bool:
    """Whether a continuation is the answer and nothing more: the answer, then its natural end.

    An exact match under a natural stop, one of the two measures of The Mirage of Model Editing (Yang et al. 2025, arXiv
    2502.11177), by whose other one, a model as the judge, teacher-forced figures of 97 % become 39 %. Blanks around the
    answer do not count; letter case does, which the release's exact match leaves out. A full stop within a
    number, as in 3.5, ends nothing; what it abbreviates, as in "St. Petersburg" for "St", is not seen.
    """
    said, wanted = text.strip(), answer.strip()
    if not said.startswith(wanted):
        return False
    rest = said[len(wanted) :].lstrip(" ")
    ends = [stop for stop in STOPS if rest.startswith(stop)]
    return not rest or any(stop != "." or not rest[1:2].isdecimal() for stop in ends)


def free_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, str]],
    *,
    known: Mapping[tuple[str, str], Score] | None = None,
    progress: Progress | None = None,
) -> list[bool]:
    """For each (prompt, answer), whether the model's own greedy continuation says the answer; see `says` and
    `free_answers`.
    """
    return free_answers(model, tokenizer, [(prompt, (answer,)) for prompt, answer in asked], known, progress)


def free_multihop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chains: Sequence[MultiHop],
    *,
    known: Mapping[tuple[str, str], Score] | None = None,
    progress: Progress | None = None,
) -> list[bool]:
    """For each chain of facts, whether any wording of its question is continued, greedily, by a right answer and its
    end; see `says` and `free_answers`. This is MQuAKE's multi-hop accuracy (see `rlsedit_fast.evaluation.metrics`), by
    free generation.
    """
    asked = [(prompt, chain.right) for chain in chains for prompt in chain.prompts]
    said = iter(free_answers(model, tokenizer, asked, known, progress))
    return [any([next(said) for _ in chain.prompts]) for chain in chains]


def free_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, Sequence[str]]],
    known: Mapping[tuple[str, str], Score] | None = None,
    progress: Progress | None = None,
) -> list[bool]:
    """For each prompt and its right answers, whether the model's own greedy continuation says one of these; see `says`.

    A continuation has two tokens more than the longest answer, or fewer where its first ones decide already. Scores
    give the first ones: up to the first difference, the tokens ranked first behind an answer's tokens are the greedy
    continuation. Most prompts that are answered wrongly are decided by them, without a pass.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        asked: each prompt with at least one answer.
        known: scores of this model by prompt and answer, in any number.
        progress: called after each batch with the prompts done so far.
    """
    known = {} if known is None else known
    ends = end_tokens(model, tokenizer)
    longest, begun, prompts = 0, list[list[int]](), list[list[int]]()
    for prompt, answers in asked:
        rows = {answer: encode_plain(tokenizer, prompt, answer) for answer in answers}
        longest = max(longest, *(len(row.target) for row in rows.values()))
        first = [_said_first(known[prompt, answer], row) for answer, row in rows.items() if (prompt, answer) in known]
        ids = max(first, key=len, default=[])
        begun.append(ids[: next((at for at, token in enumerate(ids) if token in ends), None)])
        prompts.append(encode_plain(tokenizer, prompt).ids)

    def text(at: int, new: Sequence[int]) -> str:
        return str(tokenizer.decode([*begun[at], *new], skip_special_tokens=True))

    def decided(at: int, new: Sequence[int]) -> bool:
        return not any(_may_say(text(at, new), answer) for answer in asked[at][1])

    undecided = [at for at in range(len(asked)) if not decided(at, ())]

    def report(done: int, _total: int = 0) -> None:
        if progress is not None:
            progress(len(asked) - len(undecided) + done, len(asked))

    report(0)
    made = greedy(
        model,
        [prompts[at] + begun[at] for at in undecided],
        [longest + _BEYOND - len(begun[at]) for at in undecided],
        ends=ends,
        enough=lambda i, new: decided(undecided[i], new),
        progress=report,
    )
    rest = dict(zip(undecided, made, strict=True))
    return [
        any(says(text(at, rest.get(at, ())), answer) for answer in answers) for at, (_, answers) in enumerate(asked)
    ]


def _said_first(score: Score, row: Row) -> list[int]:
    """The first tokens of the greedy continuation of a row's prompt, by the score of its target."""
    same = [one == wanted for one, wanted in zip(score.predicted, row.target, strict=True)]
    return list(score.predicted[: same.index(False) + 1 if False in same else len(same)])


def _may_say(text: str, answer: str) -> bool:
    """Whether it is open if a continuation that begins with `text` says the answer; see `says`."""
    said, wanted = text.rstrip("\ufffd").strip(), answer.strip()  # without what is not yet a whole character
    if not said.startswith(wanted):
        return wanted.startswith(said)
    rest = said[len(wanted) :].lstrip(" ")
    return any(stop.startswith(rest) for stop in STOPS)


def n_gram_entropy(text: str) -> float:
    """Weighted mean of the entropies of a text's 2- and 3-grams of words, bits: `(2/3 H_2 + 4/3 H_3) / 2`.

    Fluency as ROME has it (Meng et al. 2022, arXiv 2202.05262, sec. 3.3, after Zhang et al. 2018): a text that repeats
    itself has little. A regular expression splits words and punctuation marks, where the release takes NLTK's
    tokenizer.

    Raises:
        InputError: fewer than three words.
    """
    words = _WORD.findall(text)
    if len(words) < 3:
        raise InputError(f"a text of {len(words)} words has no 3-grams; give a longer one")
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
    """Mean `n_gram_entropy` of texts sampled behind `prompts`, the prompt included, from the five likeliest tokens.

    A text that ends before it has three words counts as 0, as one that says nothing. ROME's release counts the prompt
    among its 100 tokens and shows 100 times the figure.
    """
    texts = continuations(model, tokenizer, prompts, tokens=tokens, top_k=5, seed=seed, progress=progress)
    whole = [f"{prompt} {text}" for prompt, text in zip(prompts, texts, strict=True)]
    return sum(n_gram_entropy(text) if len(_WORD.findall(text)) >= 3 else 0.0 for text in whole) / len(whole)
