"""Consistency: whether what a model writes about a subject reads like texts about subjects that have the new answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.datasets import Texts, read_records
from rlsedit_fast.evaluation.generation import continuations
from rlsedit_fast.evaluation.scoring import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@lru_cache(maxsize=1)
def reference_texts(path: Path) -> Texts:
    """A file of reference texts in the form of ROME's `attribute_snippets.json`: a JSON list of objects with
    `relation_id`, `target_id` and `samples`, each with a `text`.

    Raises:
        InputError: a file that cannot be read so.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for at, entry in enumerate(read_records(path), 1):
        try:
            found[entry["relation_id"], entry["target_id"]] += [sample["text"] for sample in entry["samples"]]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path}, record {at} lacks {error}; expected reference texts as ROME's attribute_snippets.json has "
                "them: relation_id, target_id, and samples, a list of objects with a text"
            ) from error
    return {ids: tuple(texts) for ids, texts in found.items()}


class Likeness:
    """How alike two texts are: the cosine of their TF-IDF vectors, as scikit-learn makes them by default.

    Args:
        texts: what the inverse document frequencies are taken from.

    Raises:
        InputError: scikit-learn is not installed, or no text has a word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise InputError("references: consistency needs scikit-learn; pip install scikit-learn") from error
        self._vectors = TfidfVectorizer()
        try:
            self._vectors.fit(texts)
        except ValueError as error:
            raise InputError(f"references: no reference text has a word ({error}); give texts with words") from error

    def __call__(self, one: str, other: str) -> float:
        """From 0, where they share no word that is known, to 1."""
        first, second = self._vectors.transform([one, other])
        return float((first @ second.T).sum())


@lru_cache(maxsize=1)
def likeness(path: Path) -> Likeness:
    """`Likeness` by all the texts of a file of reference texts.

    Raises:
        InputError: see `reference_texts` and `Likeness`.
    """
    return Likeness([text for texts in reference_texts(path).values() for text in texts])


def consistency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    alike: Likeness,
    *,
    tokens: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Mean likeness, over cases, of what a model writes behind a case's `generation` prompts and its `references`.

    As ROME has it (Meng et al. 2022, arXiv 2202.05262, sec. 3.3, and its released evaluation): the texts of a case's
    prompts, the prompts included, are joined, and so are its references; each text is sampled from the five likeliest
    tokens. A text has `tokens` tokens behind its prompt, where the release counts the prompt in.

    Args:
        model: as it is now.
        tokenizer: its tokenizer.
        cases: at least one, each with prompts and references.
        alike: by all the reference texts there are, so that a word of every text counts little.
        tokens: most new tokens of a text.
        seed: of the sampling.
        progress: called after each batch with the texts done so far.
    """
    prompts = [prompt for case in cases for prompt in case.generation]
    texts = iter(continuations(model, tokenizer, prompts, tokens=tokens, top_k=5, seed=seed, progress=progress))
    said = [" ".join(f"{prompt} {next(texts)}" for prompt in case.generation) for case in cases]
    return sum(alike(text, " ".join(case.references)) for text, case in zip(said, cases, strict=True)) / len(cases)
