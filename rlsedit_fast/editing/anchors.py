"""Anchors: key statistics of text whose outputs are preserved, from every kind of input that the editor accepts."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.errors import InputError
from rlsedit_fast.files import cache_folder
from rlsedit_fast.rls import BlockMoment
from rlsedit_fast.statistics.cache import find_cached
from rlsedit_fast.statistics.key_statistics import KeyStatistics
from rlsedit_fast.statistics.sources import GivenTexts, SelfGenerated, Source, TextFile

logger = logging.getLogger(__name__)

Anchors = str | Path | Iterable[str] | Source | KeyStatistics
"""Path of a text file or of key statistics, texts, a source of text, or key statistics."""


def find_statistics(
    context: ModelContext,
    texts: Anchors | None,
    *,
    tokens: int | None,
    held_out: float,
    identity: Callable[[], str],
) -> KeyStatistics | None:
    """Returns the key statistics of anchors; see `Editor.anchor`.

    Args:
        context: the model.
        texts: see `Editor.anchor`; None for cached statistics of the model.
        tokens: number of tokens to read; None reads all of the text.
        held_out: fraction of the tokens to hold out; has no effect on key statistics.
        identity: returns the fingerprint of the unedited model, which is slow.

    Returns:
        The statistics, or None if the cache has none. Warns in that case, and if there are fewer tokens than key
        dimensions.

    Raises:
        InputError: a file does not exist, texts are names of files, or the statistics do not belong to the model.
    """
    if isinstance(texts, str | Path) and Path(texts).suffix == ".safetensors":
        texts = KeyStatistics.load(texts)
    if tokens is not None and (texts is None or isinstance(texts, KeyStatistics)):
        raise InputError(f"tokens={tokens}: key statistics have a fixed number of tokens; omit it, or pass text")
    if texts is None:
        fingerprint = identity()
        found = find_cached(fingerprint, context.layers)
        _check_alike(context, found)
        if found is None:
            logger.warning(
                "no key statistics of this model and its edited layers in %s; collect them with `rlsedit statistics`",
                cache_folder(),
            )
            return None
    elif isinstance(texts, KeyStatistics):
        found = texts
        found.check(identity(), context.layers)
    else:
        source = _source(texts)
        if tokens is None and isinstance(source, SelfGenerated):
            raise InputError("text that the model generates has no end; pass tokens=, such as tokens=100_000")
        # The statistics are not saved, so they need no fingerprint.
        found = context.collect(source, tokens=tokens, held_out=held_out, identity="")
        if held_out and not found.held_out_tokens:
            logger.warning(
                "no anchor tokens are held out, because the text has few rows of at most 512 tokens: changes are not "
                "measured on text that the prior does not preserve"
            )
    _warn_of_experts(context, found)
    width = max(
        one.key_width if one.layout is None else max(block.shape[1] for block in one.blocks)
        for one in context.projections
    )
    if found.tokens < width:
        logger.warning(
            "the anchors have %d tokens, and keys have %d dimensions: in many directions only lam limits the change; "
            "use more text, ideally several times as many tokens",
            found.tokens,
            width,
        )
    logger.info("anchors: %d tokens, %d held out: %s", found.tokens, found.held_out_tokens, found.source)
    return found


def _check_alike(context: ModelContext, found: KeyStatistics | None) -> None:
    """Raises InputError in every process if the processes found different key statistics in their caches."""
    about = None if found is None else (found.source, found.tokens, found.held_out_tokens)
    if context.processes.any(context.processes.same(about) != about):
        raise InputError(
            f"the processes find different key statistics in {cache_folder()} of their hosts",
            hint="pass the same file to all (--statistics FILE; Python: Editor.anchor(path)), or use a common folder",
        )


def _warn_of_experts(context: ModelContext, found: KeyStatistics) -> None:
    """Warns of experts that few anchors reach; `BlockPrior` holds them by a larger lam."""
    for projection in context.projections:
        moment = found.moments[projection.layer]
        if projection.layout is None:
            continue
        if not isinstance(moment, BlockMoment):
            raise InputError(
                f"these key statistics of layer {projection.layer} are not those of a mixture of experts; collect them "
                "from this model with this version"
            )
        few = int((moment.reached < projection.layout.width).sum())
        if few:
            logger.warning(
                "%s: fewer than %d anchor tokens reach %d of %d experts (the fewest: %d); these experts are held by a "
                "larger lam. Use more text",
                projection.name,
                projection.layout.width,
                few,
                projection.layout.experts,
                int(moment.reached.min()),
            )


def _source(texts: str | Path | Iterable[str] | Source) -> Source:
    if isinstance(texts, str | Path):
        if os.path.isfile(texts):
            return TextFile(texts)
        raise InputError(
            f"texts={str(texts)!r:.60}: there is no such file; pass the path of a text file, or put a single text in a "
            "list"
        )
    if isinstance(texts, Source):
        return texts
    if isinstance(texts, Sequence) and texts and all(isinstance(text, str) and os.path.isfile(text) for text in texts):
        raise InputError(
            f"texts={texts!r:.60}: these are names of files, not texts",
            hint=f"pass a single path without a list, such as {texts[0]!r}, or the contents of the files",
        )
    return GivenTexts(texts)
