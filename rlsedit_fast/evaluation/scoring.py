"""Teacher-forced scores: how likely a model finds an answer, and what it would have said instead."""

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

_TOKENS_AT_ONCE = 1024  # of a batch, with padding: rows of similar length fill it
_CPU_TOKENS_AT_ONCE = 256  # on a CPU, whose caches hold what they compute; less of it is padding too
_LOGITS_AT_ONCE = 2**25  # numbers of a batch, 128 MiB in float32
_PASS = 64  # tokens that take as long as a pass costs beside its tokens, about

Progress = Callable[[int, int], None]
"""Called with how many are done so far, and of how many."""


@dataclass(frozen=True)
class Score:
    """One answer under a model.

    Attributes:
        nll: mean negative log-likelihood of the answer's tokens, nats.
        predicted: the token ranked first at each of the answer's places, given the answer's tokens before it.
        exact: whether these are the answer's own tokens.
        right: share of the answer's tokens that are ranked first.
    """

    nll: float
    predicted: tuple[int, ...]
    exact: bool
    right: float


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, str]],
    *,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores each (prompt, answer) of `asked`, in order.

    An answer's own tokens are scored and no special one: a tokenizer that begins every text with one would otherwise
    have it graded as the answer's first token. Of tokens that tie, the one with the lowest id is ranked first.
    """
    return score_rows(model, [encode_plain(tokenizer, prompt, answer) for prompt, answer in asked], progress=progress)


def score_rows(model: PreTrainedModel, rows: Sequence[Row], *, progress: Progress | None = None) -> list[Score]:
    """Scores the target of each row, in order.

    An answer's last token is asked for and never read, so answers of one token share their prompt's pass. Where it
    costs fewer tokens, what several rows begin with is run once. The model's head is run at the answers' places alone.

    Args:
        model: a causal language model.
        rows: in any number.
        progress: called after each batch with the rows done so far.
    """
    askers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        askers[tuple(row.ids[:-1])].append(i)
    reads = [_Read(ids, min(rows[i].prompt_length for i in askers[ids]) - 1) for ids in sorted(askers)]
    scores: dict[int, Score] = {}
    decoder, batches = _plan(model, reads)
    for batch in batches:
        with torch.inference_mode():
            known = _run(decoder, batch.reads).log_softmax(-1)
            predicted = known.argmax(-1).tolist()
        end = 0
        for read in batch.reads:
            end += read.places
            for i in askers[read.ids]:
                target = rows[i].target
                places = range(end - len(target), end)
                nll = -known[list(places), target].mean()
                said = tuple(predicted[place] for place in places)
                right = sum(one == wanted for one, wanted in zip(said, target, strict=True)) / len(target)
                scores[i] = Score(float(nll), said, said == tuple(target), right)
        if progress is not None:
            progress(len(scores), len(rows))
    return [scores[i] for i in range(len(rows))]


@dataclass(frozen=True)
class _Read:
    """Tokens that a model reads.

    Attributes:
        ids: the tokens.
        first: the first of them behind which a prediction is wanted; it is wanted behind all later ones too.
        cut: how many of them are run once for all reads of a batch that begin with them; at most `first`.
    """

    ids: tuple[int, ...]
    first: int
    cut: int = 0

    @property
    def places(self) -> int:
        """How many predictions are wanted."""
        return len(self.ids) - self.first

    @property
    def rest(self) -> int:
        """Tokens behind the cut."""
        return len(self.ids) - self.cut


@dataclass(frozen=True)
class _Batch:
    reads: list[_Read]
    tokens: int
    """With padding, of both passes where there are two."""

    @property
    def cost(self) -> int:
        """In tokens."""
        return self.tokens + (2 if any(read.cut for read in self.reads) else 1) * _PASS


def _plan(model: PreTrainedModel, reads: Sequence[_Read]) -> tuple[Decoder, list[_Batch]]:
    """The batches that cost least: of whole reads, or of those whose beginnings are run once."""
    width = model.get_input_embeddings().get_parameter("weight").shape[0]
    most = min(_CPU_TOKENS_AT_ONCE, _TOKENS_AT_ONCE) if input_device(model).type == "cpu" else _TOKENS_AT_ONCE
    whole, cut = _batches(reads, width, most), _batches(_cut(reads), width, most)
    if sum(batch.cost for batch in cut) < sum(batch.cost for batch in whole):
        decoder = runner(model, try_prefixes=True)
        if decoder.prefixed:
            return decoder, cut
    return runner(model), whole


def _cut(reads: Sequence[_Read]) -> list[_Read]:
    """The reads, which are sorted, each cut where the one before or behind it goes on otherwise."""
    alike = [0, *(_alike(one.ids, other.ids) for one, other in pairwise(reads)), 0]
    cuts = [min(read.first, max(alike[at : at + 2])) for at, read in enumerate(reads)]
    shared = Counter(read.ids[:cut] for read, cut in zip(reads, cuts, strict=True))
    return [
        _Read(read.ids, read.first, cut if shared[read.ids[:cut]] > 1 else 0)
        for read, cut in zip(reads, cuts, strict=True)
    ]


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens both begin."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _batches(reads: Sequence[_Read], width: int, most: int) -> list[_Batch]:
    """Reads of one beginning together, and of similar length, in batches of at most `most` tokens and of bounded logits
    (`width` a place).
    """
    longest: dict[tuple[int, ...], int] = defaultdict(int)
    for read in reads:
        longest[read.ids[: read.cut]] = max(longest[read.ids[: read.cut]], read.rest)

    def order(read: _Read) -> tuple[int, int, tuple[int, ...]]:
        return longest[read.ids[: read.cut]] if read.cut else read.rest, read.cut, read.ids

    made: list[_Batch] = []
    part: list[_Read] = []
    beginnings: set[tuple[int, ...]] = set()
    tokens = lead = rest = places = 0
    for read in sorted(reads, key=order):
        for _ in range(2):  # the second time it begins a batch of its own
            heads = beginnings | {read.ids[: read.cut]} if read.cut else beginnings
            lead_then, rest_then, places_then = max(lead, read.cut), max(rest, read.rest), places + read.places
            tokens_then = len(heads) * lead_then + (len(part) + 1) * rest_then
            if not part or (tokens_then <= most and places_then * width <= _LOGITS_AT_ONCE):
                break
            made.append(_Batch(part, tokens))
            part, beginnings, lead, rest, places = [], set(), 0, 0, 0
        part.append(read)
        tokens, lead, rest, places, beginnings = tokens_then, lead_then, rest_then, places_then, heads
    return [*made, _Batch(part, tokens)] if part else made


def _run(decoder: Decoder, reads: Sequence[_Read]) -> torch.Tensor:
    """The logits at the places of each read in turn, `[places, vocabulary]`, float32."""
    batch = Prefixed.of(decoder, [Row(list(read.ids), -1, len(read.ids)) for read in reads], [r.cut for r in reads])
    row = torch.tensor([at for at, read in enumerate(reads) for _ in range(read.places)])
    at = torch.tensor([place - read.cut for read in reads for place in range(read.first, len(read.ids))])
    with reading(decoder, row, at) as read_off:
        logits: torch.Tensor = read_off(decoder.model(**batch.arguments()))
    return logits.float()
