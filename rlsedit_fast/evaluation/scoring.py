"""Teacher-forced scores: the NLL of an answer, and the tokens that the model ranks first at its positions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from rlsedit_fast.models.prefixes import Prefixed, reading, runner
from rlsedit_fast.models.projections import input_device
from rlsedit_fast.models.tokens import Row, encode_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlsedit_fast.models.projections import Decoder

_TOKENS_AT_ONCE = 1024  # per batch, with padding
_CPU_TOKENS_AT_ONCE = 256  # per batch on a CPU; activations fit into its caches, and there is less padding
_LOGITS_AT_ONCE = 2**25  # per batch, 128 MiB in float32
_PASS = 64  # approximate overhead of a forward pass, in tokens

Progress = Callable[[int, int], None]
"""Function that is called with the number of finished items and the total number."""


@dataclass(frozen=True)
class Score:
    """Score of one answer under a model.

    Attributes:
        nll: mean negative log-likelihood of the answer's tokens, in nats.
        predicted: token ranked first at each position of the answer, given the answer's previous tokens.
        exact: whether these are the tokens of the answer.
        token_accuracy: fraction of the answer's tokens that are ranked first.

    Example:
        >>> from rlsedit_fast.evaluation import Score
        >>> Score(nll=0.1, predicted=(7, 8), exact=True, token_accuracy=1.0).exact
        True
    """

    nll: float
    predicted: tuple[int, ...]
    exact: bool
    token_accuracy: float


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    *,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores answers to prompts.

    Special tokens that a tokenizer adds to an answer are not scored. Of tied tokens, the one with the lowest id is
    ranked first.

    Args:
        model: causal language model.
        tokenizer: tokenizer of the model.
        questions: pairs (prompt, answer).
        progress: called after each batch with the number of finished questions and the number of questions.

    Returns:
        The scores, in order.

    Example:
        >>> from rlsedit_fast.evaluation import score
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> prompt = "Toze Lado Rekuno plays the"
        >>> [one.exact for one in score(model, tokenizer, [(prompt, "clarinet"), (prompt, "harp")])]
        [True, False]
    """
    rows = [encode_plain(tokenizer, prompt, answer) for prompt, answer in questions]
    return score_rows(model, rows, progress=progress)


def score_rows(model: PreTrainedModel, rows: Sequence[Row], *, progress: Progress | None = None) -> list[Score]:
    """Scores the targets of rows.

    The last token of a target is predicted but not an input, so that targets of one token share the pass of their
    prompt. Shared prefixes are run once if that saves tokens. The model's head is run at the positions of targets only.

    Args:
        model: causal language model.
        rows: the rows, each with a target.
        progress: called after each batch with the number of finished rows and the number of rows.

    Returns:
        The scores, in order.
    """
    rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        rows_of[tuple(row.ids[:-1])].append(i)
    reads = [_Read(ids, min(rows[i].prompt_length for i in rows_of[ids]) - 1) for ids in sorted(rows_of)]
    scores: dict[int, Score] = {}
    decoder, batches = _plan(model, reads)
    for batch in batches:
        with torch.inference_mode():
            known = _run(decoder, batch.reads).log_softmax(-1)
            predicted = known.argmax(-1).tolist()
        end = 0
        for read in batch.reads:
            end += read.places
            for i in rows_of[read.ids]:
                target = rows[i].target
                places = range(end - len(target), end)
                nll = -known[list(places), target].mean()
                first = tuple(predicted[place] for place in places)
                accuracy = sum(one == wanted for one, wanted in zip(first, target, strict=True)) / len(target)
                scores[i] = Score(float(nll), first, first == tuple(target), accuracy)
        if progress is not None:
            progress(len(scores), len(rows))
    return [scores[i] for i in range(len(rows))]


@dataclass(frozen=True)
class _Read:
    """Input tokens and the positions whose predictions are needed.

    Attributes:
        ids: the tokens.
        first: index of the first token whose prediction is needed; those of all later tokens are needed too.
        cut: number of tokens that are run once for all reads of a batch with the same prefix; at most `first`.
    """

    ids: tuple[int, ...]
    first: int
    cut: int = 0

    @property
    def places(self) -> int:
        """Number of predictions."""
        return len(self.ids) - self.first

    @property
    def rest(self) -> int:
        """Number of tokens after the cut."""
        return len(self.ids) - self.cut


@dataclass(frozen=True)
class _Batch:
    reads: list[_Read]
    tokens: int
    """Number of tokens with padding, of both passes if there are two."""

    @property
    def cost(self) -> int:
        """Cost in tokens."""
        return self.tokens + (2 if any(read.cut for read in self.reads) else 1) * _PASS


def _plan(model: PreTrainedModel, reads: Sequence[_Read]) -> tuple[Decoder, list[_Batch]]:
    """Returns the cheaper batches: those of whole reads, or those whose shared prefixes are run once."""
    width = model.get_input_embeddings().get_parameter("weight").shape[0]
    most = min(_CPU_TOKENS_AT_ONCE, _TOKENS_AT_ONCE) if input_device(model).type == "cpu" else _TOKENS_AT_ONCE
    whole, cut = _batches(reads, width, most), _batches(_cut(reads), width, most)
    if sum(batch.cost for batch in cut) < sum(batch.cost for batch in whole):
        decoder = runner(model, try_prefixes=True)
        if decoder.prefixed:
            return decoder, cut
    return runner(model), whole


def _cut(reads: Sequence[_Read]) -> list[_Read]:
    """Cuts sorted reads after the longest prefix that each shares with the previous or next one."""
    alike = [0, *(_alike(one.ids, other.ids) for one, other in pairwise(reads)), 0]
    cuts = [min(read.first, max(alike[at : at + 2])) for at, read in enumerate(reads)]
    shared = Counter(read.ids[:cut] for read, cut in zip(reads, cuts, strict=True))
    return [
        _Read(read.ids, read.first, cut if shared[read.ids[:cut]] > 1 else 0)
        for read, cut in zip(reads, cuts, strict=True)
    ]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Returns the length of the common prefix."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _batches(reads: Sequence[_Read], width: int, most: int) -> list[_Batch]:
    """Groups reads of the same prefix and of similar length into batches.

    Args:
        reads: the reads.
        width: size of the vocabulary.
        most: maximum number of tokens per batch; the number of logits is limited as well.
    """
    longest: dict[tuple[int, ...], int] = defaultdict(int)
    for read in reads:
        longest[read.ids[: read.cut]] = max(longest[read.ids[: read.cut]], read.rest)

    def order(read: _Read) -> tuple[int, int, tuple[int, ...]]:
        return longest[read.ids[: read.cut]] if read.cut else read.rest, read.cut, read.ids

    batches: list[_Batch] = []
    part: list[_Read] = []
    beginnings: set[tuple[int, ...]] = set()
    tokens = lead = rest = places = 0
    for read in sorted(reads, key=order):
        for _ in range(2):  # the second time it starts a new batch
            heads = beginnings | {read.ids[: read.cut]} if read.cut else beginnings
            lead_then, rest_then, places_then = max(lead, read.cut), max(rest, read.rest), places + read.places
            tokens_then = len(heads) * lead_then + (len(part) + 1) * rest_then
            if not part or (tokens_then <= most and places_then * width <= _LOGITS_AT_ONCE):
                break
            batches.append(_Batch(part, tokens))
            part, beginnings, lead, rest, places = [], set(), 0, 0, 0
        part.append(read)
        tokens, lead, rest, places, beginnings = tokens_then, lead_then, rest_then, places_then, heads
    return [*batches, _Batch(part, tokens)] if part else batches


def _run(decoder: Decoder, reads: Sequence[_Read]) -> torch.Tensor:
    """Returns the logits at the places of all reads, `[places, vocabulary]`, float32."""
    batch = Prefixed.of(decoder, [Row(list(read.ids), -1, len(read.ids)) for read in reads], [r.cut for r in reads])
    row = torch.tensor([at for at, read in enumerate(reads) for _ in range(read.places)])
    at = torch.tensor([place - read.cut for read in reads for place in range(read.first, len(read.ids))])
    with reading(decoder, row, at) as read_off:
        logits: torch.Tensor = read_off(decoder.model(**batch.arguments()))
    return logits.float()
