"""What a model says by itself: free answers, and how much its running text repeats itself."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import MultiHop
from rlsedit_fast.evaluation.scoring import Progress
from rlsedit_fast.models.generation import batches, end_tokens, greedy
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import pad_left
from rlsedit_fast.models.projections import input_device
from rlsedit_fast.models.tokens import encode_plain

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


def says(text: str, answer: str, stops: Sequence[str] = STOPS) -> bool:
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
    ends = [stop for stop in stops if rest.startswith(stop)]
    return not rest or any(stop != "." or not rest[1:2].isdecimal() for stop in ends)


def free_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, str]],
    *,
    stops: Sequence[str] = STOPS,
    progress: Progress | None = None,
) -> list[bool]:
    """For each (prompt, answer), whether the model's own greedy continuation says the answer; see `says`."""
    longest = max(len(encode_plain(tokenizer, prompt, answer).target) for prompt, answer in asked)
    prompts = [prompt for prompt, _ in asked]
    texts = continuations(model, tokenizer, prompts, tokens=longest + _BEYOND, progress=progress)
    return [says(text, answer, stops) for text, (_, answer) in zip(texts, asked, strict=True)]


def free_multihop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chains: Sequence[MultiHop],
    *,
    progress: Progress | None = None,
) -> list[bool]:
    """For each chain of facts, whether any wording of its question is continued, greedily, by a right answer and its
    end; see `says`. This is MQuAKE's multi-hop accuracy (see `rlsedit_fast.evaluation.metrics`), by free generation.
    """
    prompts = [prompt for chain in chains for prompt in chain.prompts]
    longest = max(len(encode_plain(tokenizer, c.prompts[0], answer).target) for c in chains for answer in c.right)
    texts = iter(continuations(model, tokenizer, prompts, tokens=longest + _BEYOND, progress=progress))
    said = [[next(texts) for _ in chain.prompts] for chain in chains]
    return [
        any(says(text, answer) for text in wordings for answer in chain.right)
        for chain, wordings in zip(chains, said, strict=True)
    ]


def n_gram_entropy(text: str) -> float:
    """Weighted mean of the entropies of a text's 2- and 3-grams of words, bits: `(2/3 H_2 + 4/3 H_3) / 2`.

    Fluency as ROME has it (Meng et al. 2022, arXiv 2202.05262, sec. 3.3, after Zhang et al. 2018): a text that repeats
    itself has little. Words and punctuation marks are told apart by a regular expression, where the release takes
    NLTK's tokenizer.

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
