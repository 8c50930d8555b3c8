"""Key statistics, the anchor moment `E[k k^T]` of each edited layer: collected from a stream of text, kept in files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast import ops
from rlsedit_fast.editing.interrupts import held_back
from rlsedit_fast.editing.matrices import read_matrices, write_matrices
from rlsedit_fast.editing.sources import Source
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.passes import quiet, read_keys
from rlsedit_fast.models.projections import Decoder, Projection
from rlsedit_fast.models.tokens import Row, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PIECE = 512
"""Most tokens of a row; a longer text is read in pieces, each without what stood before it."""
_PASS = 4096
"""Most tokens of a pass, padding included: bounds its memory, and is enough to fill a GPU."""
_CPU_FORWARD = 512
"""Most tokens of a forward on a CPU, whose caches hold what they compute; a pass adds the keys of several at once."""
_WINDOW = 8 * _PASS
"""Tokens among which rows of like length are put together, so that little of a pass is padding."""
_SAVE_SECONDS = 300.0
"""Between checkpoints, which are as large as the sums: 4 d_k^2 bytes a layer."""

STATISTICS = "rlsedit-fast key statistics 1"
_UNDER_WAY = "rlsedit-fast key statistics under way 1"
"""What the files say that they are."""


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """What the keys of some layers are like on running text.

    Attributes:
        moments: by layer, `E[k k^T] [d_k, d_k]` over all tokens, float32.
        tokens: how many.
        fingerprint: of the model, see `models.fingerprint`.
        source: what text it was.
    """

    moments: dict[int, Tensor]
    tokens: int
    fingerprint: str
    source: str

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        about = {"tokens": self.tokens, "fingerprint": self.fingerprint, "source": self.source}
        about["layers"] = sorted(self.moments)
        write_matrices(Path(path), STATISTICS, self.moments, about)

    @classmethod
    def load(cls, path: str | Path, *, layers: Sequence[int] | None = None) -> KeyStatistics:
        """Reads a file of `save`, all of it or some layers, into the CPU's memory.

        Raises:
            InputError: the file is not there, is damaged or is something else, or lacks a layer.
        """
        moments, about = read_matrices(Path(path), STATISTICS, layers)
        return cls(moments, about["tokens"], about["fingerprint"], about["source"])

    def check(self, fingerprint: str, layers: Sequence[int]) -> None:
        """Raises InputError where they are not of the model with this fingerprint, or lack one of the layers."""
        if fingerprint != self.fingerprint:
            raise InputError(
                f"these key statistics are of model {self.fingerprint[:12]}…, this model is {fingerprint[:12]}…: its "
                "weights or settings are others; collect them from this model"
            )
        if lacking := sorted(set(layers) - set(self.moments)):
            raise InputError(
                f"these key statistics are of layers {sorted(self.moments)} and lack {lacking}; collect them for all "
                "layers that are edited"
            )


@dataclass(frozen=True)
class _Place:
    """How far a collection has come: in a window of the source, with its first `passes` passes done.

    Attributes:
        position: in the source, where the window begins.
        before: tokens of the windows before it.
        passes: done in it.
        tokens: done in all.
    """

    position: int = 0
    before: int = 0
    passes: int = 0
    tokens: int = 0


@dataclass
class _State:
    """What was added up, and from which text. An interrupt must find both together, so `place` changes in one step.

    Attributes:
        sums: by layer, of `k k^T` over the tokens done.
        place: where the next pass begins.
        whole: false while a pass is being added, when some layers have it and some do not.
    """

    sums: dict[int, Tensor]
    place: _Place
    whole: bool = True


def collect(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase,
    projections: Sequence[Projection],
    source: Source,
    *,
    tokens: int | None = None,
    longest: int | None,
    progress: Callable[[int, int | None], None] | None = None,
    checkpoint: str | Path | None = None,
    identity: str | None = None,
) -> KeyStatistics:
    """The mean of `k k^T` over the tokens of a stream of text, of all projections at once.

    A pass has at most 4,096 tokens and stops at the deepest projection; the sums are float32, one matrix a layer.
    Over 10^6 tokens of 192 features (spectrum of condition 4·10^5) they came out wrong by 2·10^-7 of
    `sqrt(M_ii M_jj)` in the root mean square, and by 3·10^-7 of the largest eigenvalue; float64 sums of float32 passes
    by 2.5·10^-8 and 5·10^-8, for twice the memory. Both are small beside the 10^-3 by which 10^6 tokens differ from all
    text. The error grows like the root of the number of passes.

    With a checkpoint, what was done is saved there every five minutes, at the end, and at an interrupt or error; a
    later call with the same arguments goes on from it to the result of an uninterrupted one, to the last bit where the
    passes are. The file is the caller's to remove once the statistics are saved.

    Args:
        decoder: the model.
        tokenizer: the model's.
        projections: the layers wanted.
        source: the text.
        tokens: how many to read, exactly, if there are so many; None for all of a text that ends.
        longest: most tokens that the model takes; None where it sets no limit.
        progress: called after each pass with the tokens done so far, and `tokens`.
        checkpoint: a file for the state of the collection.
        identity: the model's fingerprint; by default it is taken, which reads all of the weights.

    Returns:
        The statistics, each moment on its projection's device. Less text than asked for is a warning in the log.

    Raises:
        InputError: no text, keys that are not finite, or a checkpoint that is damaged, of another collection, or of
            no use because the text cannot be read again.
    """
    if tokens is not None and tokens < 1:
        raise InputError(f"tokens={tokens}: expected at least 1, or None for all of the text")
    if checkpoint is not None and not source.repeatable:
        raise InputError(f"checkpoint={str(checkpoint)!r}: {source.name} cannot be read again; read them from a file")
    width = min(longest or _PIECE, _PIECE)
    identity = fingerprint(decoder.model) if identity is None else identity
    about = {"fingerprint": identity, "source": source.name, "tokens asked for": tokens}
    about |= {"tokens of a row": width, "tokens of a pass": _PASS, "tokens of a window": _WINDOW}
    state = _State(
        {p.layer: p.weight.new_zeros((p.weight.shape[1],) * 2, dtype=torch.float32) for p in projections}, _Place()
    )
    file = None if checkpoint is None else _Checkpoint(Path(checkpoint), about)
    if file is not None:
        file.restore(state)
    with quiet(decoder.model):
        try:
            for part in _passes(source, tokenizer, state, tokens, width):
                _add(decoder, projections, part, state)
                if progress is not None:
                    progress(state.place.tokens, tokens)
                if file is not None and file.due():
                    file.write(state)
        finally:
            if file is not None and state.whole and state.place.tokens:
                file.write(state)
    done = state.place.tokens
    if not done:
        raise InputError("anchor texts: none were given, or all are blank; give texts of the kind to be kept")
    if tokens is not None and done < tokens:
        logger.warning("%s: the text ended after %d of the %d tokens asked for", source.name, done, tokens)
    return KeyStatistics({layer: total.div_(done) for layer, total in state.sums.items()}, done, identity, source.name)


def _passes(
    source: Source, tokenizer: PreTrainedTokenizerBase, state: _State, tokens: int | None, width: int
) -> Iterator[list[Row]]:
    """The passes from `state.place` on; moves it on to the next window."""
    stream = source.read(tokenizer, state.place.position)
    while tokens is None or state.place.before < tokens:
        rows, position = _window(stream, width, None if tokens is None else tokens - state.place.before)
        if not rows:
            return
        yield from _grouped(rows, _PASS)[state.place.passes :]
        state.place = _Place(position, before=state.place.tokens, tokens=state.place.tokens)


def _window(stream: Iterator[tuple[int, list[int]]], width: int, room: int | None) -> tuple[list[Row], int]:
    """Whole texts in rows of at most `width` tokens, until there are enough of them; the last is cut at `room`."""
    rows: list[Row] = []
    held = position = 0
    enough = _WINDOW if room is None else min(_WINDOW, room)
    while held < enough and (item := next(stream, None)) is not None:
        position, ids = item
        ids = ids if room is None else ids[: room - held]
        held += len(ids)
        rows += [Row(ids[at : at + width], -1, 0) for at in range(0, len(ids), width)]
    return rows, position


def _grouped(rows: list[Row], most: int) -> list[list[Row]]:
    """Rows of similar length together, at most `most` tokens with padding."""
    groups: list[list[Row]] = [[]]
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(row.ids) > most:
            groups.append([])
        groups[-1].append(row)
    return groups


def _add(decoder: Decoder, projections: Sequence[Projection], rows: list[Row], state: _State) -> None:
    """Adds one pass to the sums of all layers.

    Raises:
        InputError: keys that are not finite.
    """
    found: dict[int, list[Tensor]] = {projection.layer: [] for projection in projections}
    for part in _grouped(rows, min(_CPU_FORWARD, _PASS)) if decoder.device.type == "cpu" else [rows]:
        ids, mask = pad(part, decoder.device)
        seen = mask.bool()
        keys, _ = read_keys(decoder, projections, {"input_ids": ids, "attention_mask": mask, "use_cache": False})
        for layer, kept in found.items():
            kept.append(keys[layer][seen.to(keys[layer].device)])
    place = state.place
    with held_back(1):  # a second one does not wait
        state.whole = False
        for projection in projections:
            total = state.sums[projection.layer]
            ops.moment_(total, torch.cat(found[projection.layer]).to(total.device))
            if not bool(total.diagonal().isfinite().all()):  # it holds every key's own square
                raise InputError(
                    f"{projection.name}: the anchor texts give keys that are not finite; check the weights"
                )
        state.place = replace(place, passes=place.passes + 1, tokens=place.tokens + sum(len(row.ids) for row in rows))
        state.whole = True


class _Checkpoint:
    """The file that a collection is taken up from, and when it is time to write it again."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._about = about
        self._written = time.monotonic()

    def restore(self, state: _State) -> None:
        """Fills `state` from the file, if there is one.

        Raises:
            InputError: the file is damaged, or of another collection.
        """
        if not self._path.exists():
            return
        sums, found = read_matrices(self._path, _UNDER_WAY)
        place = _Place(**found.pop("place"))
        wanted = self._about | {"layers": sorted(state.sums)}
        found["layers"] = sorted(sums)
        if other := [name for name in wanted if wanted[name] != found.get(name)]:
            raise InputError(
                f"checkpoint {str(self._path)!r} is of another collection, by its {', '.join(other)}; remove it to "
                "start anew, or name another file"
            )
        for layer, total in state.sums.items():
            total.copy_(sums[layer])
        state.place = place
        logger.info("going on from %s, where %d tokens are done", self._path, place.tokens)

    def due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return time.monotonic() - self._written >= _SAVE_SECONDS

    def write(self, state: _State) -> None:
        """Writes the file, whole or not at all."""
        write_matrices(self._path, _UNDER_WAY, state.sums, self._about | {"place": asdict(state.place)})
        self._written = time.monotonic()
