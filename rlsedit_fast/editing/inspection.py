"""What an editor finds in a model before it edits: its projections, the edited state, contexts that it samples."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.edits import Edit
from rlsedit_fast.editing.keys import request_keys, text_keys
from rlsedit_fast.editing.presets import recognise
from rlsedit_fast.editing.requests import Request, prepare, troubles
from rlsedit_fast.editing.sources import Source
from rlsedit_fast.editing.statistics import KeyStatistics, collect
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.models.generation import sample
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import Decoder, Projection, find_decoder
from rlsedit_fast.models.sites import Site, find_site
from rlsedit_fast.rls.checks import all_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelContext:
    """A model and where it is edited, found by `inspect_model`.

    Attributes:
        model: the causal language model.
        tokenizer: its tokenizer.
        config: the settings, with the context prefixes that the model wrote in place of how many it was to write.
        decoder: its blocks.
        projections: what is edited in them, ascending.
        site: where values are searched.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: EditConfig
    decoder: Decoder
    projections: Sequence[Projection]
    site: Site

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that are edited, ascending."""
        return tuple(projection.layer for projection in self.projections)

    def prepare(self, edits: Iterable[Edit]) -> list[Request]:
        """Edits as tokens; see `requests.prepare`."""
        return prepare(self.tokenizer, edits, self.config, longest=_longest(self.model))

    def troubles(self, edits: Iterable[Edit]) -> dict[int, str]:
        """Which edits `prepare` would refuse, by their place, and why."""
        return troubles(self.tokenizer, edits, self.config, longest=_longest(self.model))

    def request_keys(self, requests: Sequence[Request]) -> list[Tensor]:
        """Their keys in every edited layer, `[n, contexts, d_k]` each; see `keys.request_keys`."""
        return request_keys(self.decoder, self.projections, requests)[0]

    def text_keys(self, texts: Iterable[str]) -> list[Tensor]:
        """The keys of every token of texts in every edited layer; see `keys.text_keys`."""
        return text_keys(self.decoder, self.tokenizer, self.projections, texts, longest=_longest(self.model))

    def collect(self, source: Source, **options: Any) -> KeyStatistics:
        """Key statistics of the edited layers; see `statistics.collect`, also for the options."""
        longest = _longest(self.model)
        return collect(self.decoder, self.tokenizer, self.projections, source, longest=longest, **options)


def inspect_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EditConfig) -> ModelContext:
    """Finds in a model what is to be edited, with a forward over two tokens and one for contexts of its own.

    Args:
        model: a causal language model, of which nothing is changed.
        tokenizer: its tokenizer.
        config: which layers, and how.

    Raises:
        ModelError: the layers or their projections are not there, or cannot be edited (together).
        InputError: a weight to be edited is not finite, or the tokenizer has more tokens than the model.
    """
    decoder = find_decoder(model, layer_module=config.layer_module, projection_module=config.projection_module)
    known = recognise(model.config)
    layers = known.layers if known and config.layers is None else config.layers_of(len(decoder.blocks))
    projections: Sequence[Projection] = decoder.select(layers)
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    if tokenizer.vocab_size > rows:  # without what a user added, which may well be used by no edit
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {rows}; give the model's own"
        )
    for projection in projections:
        if not all_finite(projection.weight):
            raise InputError(f"{projection.name}: the weight is not finite; load the model anew")
    with quiet(model):
        decoder = with_prefixes(decoder, longest=_longest(model))
        site = find_site(decoder, projections)
    if not site.direct and len(projections) > 1:
        projections = _one_layer(model, projections, config)
    return ModelContext(model, tokenizer, _with_contexts(model, tokenizer, config), decoder, projections, site)


def _longest(model: PreTrainedModel) -> int | None:
    """Most tokens that the model takes."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _one_layer(model: PreTrainedModel, projections: Sequence[Projection], config: EditConfig) -> Sequence[Projection]:
    """What a projection's change does to the stream depends on its layer here, so layers cannot share one."""
    why = (
        f"{type(model).__name__} normalises or scales a projection's output before it adds it to the residual "
        "stream, so that a change cannot be divided among layers"
    )
    if config.layers is not None:
        raise ModelError(f"layers={config.layers}: {why}; name one layer")
    logger.info("%s; only layer %d is edited", why, projections[-1].layer)
    return projections[-1:]


def _with_contexts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EditConfig) -> EditConfig:
    """The settings with what the model writes as context prefixes, so that these can be read and are kept."""
    if not config.context_samples:
        return config
    made = sample(
        model,
        tokenizer,
        texts=config.context_samples,
        length=config.context_tokens + 1,
        seed=config.context_seed,
    )
    texts = [str(tokenizer.decode(drawn.ids, skip_special_tokens=True)).strip() for drawn in made]
    distinct = [text for text in dict.fromkeys(texts) if text and text not in config.context_prefixes]
    if len(distinct) < len(texts):
        told = "of %d sampled context prefixes %d are left: others are blank or repeat one"
        logger.warning(told, len(texts), len(distinct))
    return replace(config, context_prefixes=(*config.context_prefixes, *distinct), context_samples=0)
