"""Consistency: similarity of generated texts about a subject and reference texts about subjects with the new answer."""

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
    """Reads reference texts in the format of ROME's `attribute_snippets.json`.

    Args:
        path: JSON list of objects with `relation_id`, `target_id` and `samples`, a list of objects with a `text`.

    Returns:
        The texts by the ids of relation and answer.

    Raises:
        InputError: the file cannot be read or has another format.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for at, entry in enumerate(read_records(path), 1):
        try:
            found[entry["relation_id"], entry["target_id"]] += [sample["text"] for sample in entry["samples"]]
        except (KeyError, TypeError) as error:
            problem = f"the field {error} is missing" if isinstance(error, KeyError) else "a field has another type"
            raise InputError(
                f"{path}, record {at}: {problem}; expected the format of ROME's attribute_snippets.json: relation_id, "
                "target_id, and samples, a list of objects with a text"
            ) from error
    return {ids: tuple(texts) for ids, texts in found.items()}


class TextSimilarity:
    """Cosine similarity of the TF-IDF vectors of two texts, with the default settings of scikit-learn.

    Args:
        texts: texts that determine the inverse document frequencies.

    Raises:
        InputError: scikit-learn is not installed, or no text has a word.

    Example:
        >>> from rlsedit_fast.evaluation import TextSimilarity
        >>> similarity = TextSimilarity(["cat dog", "cat owl"])
        >>> round(similarity("Cat dog", "dog, cat"), 6), similarity("cat", "dog")
        (1.0, 0.0)
    """

    def __init__(self, texts: Sequence[str]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError as error:
            raise InputError("references: consistency requires scikit-learn; pip install scikit-learn") from error
        self._vectors = TfidfVectorizer()
        try:
            self._vectors.fit(texts)
        except ValueError as error:
            raise InputError(
                f"references: no reference text has a word ({error}); expected texts with words"
            ) from error

    def __call__(self, one: str, other: str) -> float:
        """Returns the similarity, from 0 (no common word that occurs in `texts`) to 1."""
        first, second = self._vectors.transform([one, other])
        return float((first @ second.T).sum())


@lru_cache(maxsize=1)
def reference_similarity(path: Path) -> TextSimilarity:
    """Returns the text similarity with the document frequencies of all texts of a file.

    Args:
        path: see `reference_texts`.

    Raises:
        InputError: see `reference_texts` and `TextSimilarity`.
    """
    return TextSimilarity([text for texts in reference_texts(path).values() for text in texts])


def consistency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    similarity: TextSimilarity,
    *,
    tokens: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> float:
    """Measures the consistency of generated texts with reference texts.

    The metric follows ROME (Meng et al. 2022, arXiv 2202.05262, sec. 3.3, and its released evaluation): the texts
    generated from a case's prompts, prompts included, are joined, and so are its references. Texts are sampled from the
    five most likely tokens. A text has `tokens` new tokens; the release includes the prompt in this number.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        cases: at least one case, each with `generation` and `references`.
        similarity: text similarity with the document frequencies of all reference texts.
        tokens: maximum number of new tokens per text.
        seed: random seed of the sampling.
        progress: called after each batch with the number of finished texts and the number of texts.

    Returns:
        The mean similarity over the cases, from 0 to 1.
    """
    prompts = [prompt for case in cases for prompt in case.generation]
    texts = iter(continuations(model, tokenizer, prompts, tokens=tokens, top_k=5, seed=seed, progress=progress))
    joined = [" ".join(f"{prompt} {next(texts)}" for prompt in case.generation) for case in cases]
    pairs = zip(joined, cases, strict=True)
    return sum(similarity(text, " ".join(case.references)) for text, case in pairs) / len(cases)
