"""Text on which `rlsedit edit` measures perplexity and KL divergence before and after."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlsedit_fast.editing import Editor
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.statistics.sources import SelfGenerated, Source, TextFile

if TYPE_CHECKING:
    from rlsedit_fast.evaluation.stability import TextProbe

TOKENS, LENGTH = 2000, 128  # of all texts, and of one text
_GENERATED = 16, 64  # texts and their tokens; more would take longer than to apply a few edits
_LEAST = 500  # tokens; a file with fewer tokens after the anchors is not used


def probe_other_text(editor: Editor, options: argparse.Namespace) -> tuple[TextProbe, dict[str, Any]]:
    """Measures the model on text that is not among the anchors.

    The text is the part of --text FILE after the anchors if it is long enough. Otherwise the model generates it, with
    another seed than that of --self-generate.

    Returns:
        The probe, and the results so far: `text`, a description, and `before`, the fields of a `Stability`.
    """
    from rlsedit_fast.evaluation.stability import TextProbe

    length = min(LENGTH, max_tokens(editor.model.config) or LENGTH)
    rows, what = list[list[int]](), ""
    if options.text is not None:
        rows = list(_rows(TextFile(options.text), editor, skip=options.tokens))
        what = f"{options.text.name}, the part after the anchors"
    if sum(map(len, rows)) < _LEAST:
        texts, most = _GENERATED
        source = SelfGenerated(editor.model, seed=(options.seed or 0) + 1, length=min(most, length), batch=texts)
        rows = [ids for _, ids in islice(source.read(editor.tokenizer, 0), texts)]
        what = "text that the model generated before the edits"
    decoded = [str(editor.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    probe = TextProbe(editor.model, editor.tokenizer, decoded, tokens=TOKENS, length=length)
    return probe, {"text": what, "before": asdict(probe.unedited)}


def _rows(source: Source, editor: Editor, *, skip: int = 0) -> Iterator[list[int]]:
    """Yields the tokens of texts, without the texts of the first `skip` tokens, until there are `TOKENS`."""
    taken = 0
    for _, ids in source.read(editor.tokenizer, 0):
        if skip > 0:
            skip -= len(ids)
            continue
        if len(ids) < 8:  # headings
            continue
        yield ids[:LENGTH]
        taken += min(len(ids), LENGTH)
        if taken >= TOKENS:
            return
