"""Protected prompts: present outputs that are preserved, and wanted continuations or values."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlsedit_fast.baselines import RECURSIVE
from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.context import ModelContext
from rlsedit_fast.editing.requests import Request, prepare
from rlsedit_fast.editing.rows import EditRows
from rlsedit_fast.editing.search.objective import measure
from rlsedit_fast.editing.search.value_search import ValueFinder
from rlsedit_fast.errors import InputError, RequestError, listed
from rlsedit_fast.models.loading import max_tokens
from rlsedit_fast.rls.checks import all_finite
from rlsedit_fast.statistics.sources import each_text

if TYPE_CHECKING:
    from rlsedit_fast.editing.layers import EditedLayers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Protection:
    """Prompts to protect.

    Attributes:
        texts: the prompts.
        weight: weight of each token.
        tokens: number of protected tokens.
        keys: keys of every token per layer, `[tokens, d_k]`, in host memory; empty with requests.
        values: outputs on these keys per layer, `[tokens, d_v]`; None for the present ones.
        requests: requests whose values are searched, one per prompt.
    """

    texts: list[str]
    weight: float
    tokens: int
    keys: Sequence[Tensor] = ()
    values: Sequence[Tensor] | None = None
    requests: Sequence[Request] = ()

    @property
    def keeps_outputs(self) -> bool:
        """Whether the present outputs are preserved, so that adding it does not change the model."""
        return self.values is None and not self.requests

    def parts(self) -> list[Protection]:
        """Returns the parts that are added one after the other."""
        from rlsedit_fast.editing.layers import EditedLayers

        if not self.requests:
            return [self]
        size = EditedLayers.most_at_once(len(self.requests[0].contexts))
        return [
            replace(self, texts=self.texts[at : at + size], requests=self.requests[at : at + size])
            for at in range(0, len(self.requests), size)
        ]

    def add(self, layers: EditedLayers, context: ModelContext, adherence: float | None) -> list[EditRows]:
        """Adds the rows to the layers and returns them; see `EditedLayers.protect` and `protect_values`."""
        if not self.requests:
            return layers.protect(self.keys, self.weight, self.values)
        config = _last_token(context)
        values = ValueFinder(context.site, config).find(self.requests)
        rows = layers.protect_values(self.requests, values, config.effective_rows, self.weight, adherence)
        found = measure(context.site, [request.contexts[0] for request in self.requests])
        failed = [text for text, rank in zip(self.texts, found.rank.tolist(), strict=True) if rank > 1]
        if failed:
            logger.warning(
                "the model does not continue %d of %d protected prompts as wanted: %s; increase weight",
                len(failed),
                len(self.texts),
                ", ".join(listed(map(repr, failed), 5)),
            )
        return rows


def make_protection(
    context: ModelContext,
    texts: list[str],
    weight: float,
    continuations: Iterable[str] | None,
    values: Sequence[Tensor] | None,
) -> Protection:
    """Checks the arguments of `Editor.protect` and reads the keys of the prompts.

    Raises:
        InputError: see `Editor.protect`.
    """
    if continuations is None and values is None:
        keys = context.text_keys(texts)
        return Protection(texts, weight, len(keys[0]), [key.cpu() for key in keys])
    name = "values" if continuations is None else "continuations"
    if continuations is not None and values is not None:
        raise InputError("continuations and values exclude each other; pass one of them")
    if context.config.rule != RECURSIVE:
        raise InputError(f"{name}: rule={context.config.rule!r} does not support them; use rule={RECURSIVE!r}")
    if values is not None:
        keys = context.text_keys(texts)
        values = _checked_values(context, values, len(keys[0]))
        return Protection(texts, weight, len(keys[0]), [key.cpu() for key in keys], values)
    wanted = list(each_text(continuations or ()))
    if len(wanted) != len(texts):
        raise InputError(f"there are {len(texts)} prompts and {len(wanted)} continuations; pass one for each prompt")
    try:
        edits = [Edit(text, "", one) for text, one in zip(texts, wanted, strict=True)]
        longest = max_tokens(context.model.config)
        requests = prepare(context.tokenizer, edits, _last_token(context), longest=longest)
    except RequestError as error:
        raise InputError(f"continuations: {error}") from error
    return Protection(texts, weight, len(texts), requests=requests)


def _last_token(context: ModelContext) -> EditConfig:
    """Returns the settings for values at the last token of prompts, which have no subject."""
    return context.config.replace(fact_token="last", same_subject="separate", search={"kl_prompts": ()})


def _checked_values(context: ModelContext, values: Sequence[Tensor], tokens: int) -> list[Tensor]:
    wanted = [[tokens, projection.value_width] for projection in context.projections]
    tensors = isinstance(values, Sequence) and all(isinstance(one, Tensor) for one in values)
    found = [list(one.shape) for one in values] if tensors else repr(values)[:60]
    if found != wanted:
        raise InputError(f"values: {found}; expected one tensor [tokens, d_v] per edited layer: {wanted}")
    if not all(one.is_floating_point() for one in values) or not all_finite(*values):
        raise InputError("values: expected finite floating-point tensors")
    return [one.detach().to("cpu", torch.promote_types(one.dtype, torch.float32)) for one in values]
