"""The model and where it is edited: its projections, the hidden state that is searched, sampled contexts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from rlsedit_fast.baselines import RECURSIVE, make_rule
from rlsedit_fast.baselines.experts import Carriers
from rlsedit_fast.baselines.memory import LayerMemory, plan_memory
from rlsedit_fast.data.edits import Edit
from rlsedit_fast.editing.config import CHAT_FORMS, EditConfig
from rlsedit_fast.editing.keys import text_keys
from rlsedit_fast.editing.presets import find_preset
from rlsedit_fast.editing.requests import Request, prepare
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.models.answers import supports_chat
from rlsedit_fast.models.generation import sample
from rlsedit_fast.models.linear import Projection
from rlsedit_fast.models.loading import check_config, max_tokens
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.prefixes import with_prefixes
from rlsedit_fast.models.projections import Decoder, find_decoder
from rlsedit_fast.models.sites import Site, find_site
from rlsedit_fast.models.tokenizer_checks import check_tokenizer
from rlsedit_fast.processes import Processes
from rlsedit_fast.rls.checks import all_finite
from rlsedit_fast.statistics.collection import collect
from rlsedit_fast.statistics.key_statistics import KeyStatistics
from rlsedit_fast.statistics.sources import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelContext:
    """A model and where it is edited; see `inspect_model`.

    Attributes:
        model: the causal language model.
        tokenizer: its tokenizer.
        config: the settings, with sampled context prefixes instead of their number.
        decoder: the decoder layers.
        projections: the edited projections, ascending by layer.
        site: the hidden state that the value search changes.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: EditConfig
    decoder: Decoder
    projections: Sequence[Projection]
    site: Site

    @property
    def processes(self) -> Processes:
        """The processes that hold the model together."""
        return self.decoder.processes

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the edited layers, ascending."""
        return tuple(projection.layer for projection in self.projections)

    def prepare(self, edits: Iterable[Edit | Mapping[str, Any]]) -> list[Request]:
        """Validates and tokenizes edits; see `requests.prepare`."""
        return prepare(self.tokenizer, edits, self.config, longest=max_tokens(self.model.config))

    def text_keys(self, texts: Iterable[str]) -> list[Tensor]:
        """Reads the keys of every token of texts in each edited layer; see `keys.text_keys`."""
        return text_keys(self.decoder, self.tokenizer, self.projections, texts, longest=max_tokens(self.model.config))

    def collect(self, source: Source, **options: Any) -> KeyStatistics:
        """Collects key statistics of the edited layers; see `statistics.collect` for the options."""
        return collect(
            self.decoder, self.tokenizer, self.projections, source, longest=max_tokens(self.model.config), **options
        )

    def memory(self) -> list[LayerMemory]:
        """Returns the memory that editing needs in addition to the model, per edited layer."""
        return _memory(self.projections, self.config)


def check_arguments(model: object, tokenizer: object, config: object) -> None:
    """Checks the types of the arguments of an editor, and that the model can generate.

    Raises:
        InputError: an argument has the wrong type.
        ModelError: the model has no language model head, or is an encoder-decoder model.
    """
    if isinstance(tokenizer, torch.nn.Module) and hasattr(model, "vocab_size"):
        raise InputError("the first argument is a tokenizer and the second one a model; swap them")
    if not isinstance(model, torch.nn.Module):
        kind = type(model).__name__
        if isinstance(getattr(model, "model", None), torch.nn.Module):
            raise InputError(
                f"model is a {kind}, which contains a model; pass its parts: Editor(pipeline.model, pipeline.tokenizer)"
            )
        raise InputError(f"model is a {kind}; expected a loaded model. Editor.from_pretrained(path) loads one")
    if not callable(tokenizer) or not hasattr(tokenizer, "vocab_size"):
        raise InputError(f"tokenizer is a {type(tokenizer).__name__}; expected a tokenizer of transformers")
    if config is not None and not isinstance(config, EditConfig):
        raise InputError(f"config is a {type(config).__name__}; expected an EditConfig, such as EditConfig(**settings)")
    check_config(getattr(model, "config", None))
    head = getattr(model, "get_output_embeddings", None)
    if head is not None and head() is None:
        raise ModelError(f"{type(model).__name__} has no language model head", hint="load it with AutoModelForCausalLM")


def inspect_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EditConfig,
    processes: Processes | None = None,
) -> ModelContext:
    """Finds where a model is edited, with a forward pass over two tokens, and samples contexts if requested.

    Args:
        model: causal language model; it is not modified, except that quantized projections to be edited are replaced by
            ordinary ones with the same weights.
        tokenizer: its tokenizer.
        config: settings of the editor.
        processes: the processes that edit the model; by default those that hold it together.

    Raises:
        ModelError: the layers or their projections are not found, or cannot be edited (together).
        InputError: a weight to be edited contains NaN/Inf, or the tokenizer is that of another model.
    """
    decoder = find_decoder(model, layer_module=config.layer_module, projection_module=config.projection_module)
    decoder = replace(decoder, processes=processes or decoder.processes)
    projections: Sequence[Projection] = decoder.select(choose_layers(decoder, config), dequantize=True)
    check_tokenizer(model, tokenizer)
    _check_settings(projections, config)
    decoder.processes.agree(lambda: _check_finite(projections))
    with quiet(model):
        decoder = with_prefixes(decoder, longest=max_tokens(model.config))
        site = find_site(decoder, projections)
    if not site.direct and len(projections) > 1:
        projections = _single_layer(model, projections, config)
    return ModelContext(model, tokenizer, _with_sampled_contexts(model, tokenizer, config), decoder, projections, site)


def _check_finite(projections: Sequence[Projection]) -> None:
    for projection in projections:
        if not all_finite(*projection.tensors):
            raise InputError(f"{projection.name}: the weight contains NaN/Inf; load the model again")


def choose_layers(decoder: Decoder, config: EditConfig) -> Sequence[int]:
    """Returns the layers to edit: those of the settings, or the default ones.

    Default layers are chosen among those that have an MLP. If they include ordinary MLPs and mixtures of experts, the
    former are edited. If all of them are mixtures, the last is the only one: it has capacity for many edits.

    Raises:
        ModelError: no layer has an MLP, or see `Decoder.locate`.
    """
    if config.layers is not None:
        return config.layers
    known = find_preset(decoder.model.config)
    editable = decoder.editable
    if not editable:
        decoder.locate([0])  # raises the error that states what the layer contains
    layers = known.layers if known else [editable[at] for at in config.layers_for(len(editable))]
    ordinary = [projection.layer for projection in decoder.locate(layers) if projection.layout is None]
    return ordinary or layers[-1:]


def plan_layers(model: PreTrainedModel, config: EditConfig) -> tuple[Sequence[Projection], list[LayerMemory]]:
    """Returns the projections that an editor would edit and the memory it needs, also for a model on the meta device.

    Raises:
        ModelError: see `inspect_model`.
        InputError: a setting is not supported.
    """
    decoder = find_decoder(model, layer_module=config.layer_module, projection_module=config.projection_module)
    projections = decoder.locate(choose_layers(decoder, config))
    _check_settings(projections, config)
    return projections, _memory(projections, config)


def _memory(projections: Sequence[Projection], config: EditConfig) -> list[LayerMemory]:
    rule = make_rule(config.rule, config.rule_options)
    rows = rows_per_edit(config)
    return plan_memory(projections, delay=config.delay, rows=rows, rule=rule, growing=config.experts == "exact")


def rows_per_edit(config: EditConfig) -> int:
    """Returns the rows of an edit in each layer, at most."""
    return config.contexts.count if config.effective_rows == "contexts" else 1


def _check_settings(projections: Sequence[Projection], config: EditConfig) -> None:
    """Raises InputError for settings that a mixture of experts does not support."""
    mixture = next((projection.name for projection in projections if projection.layout is not None), None)
    carriers = get_args(Carriers)
    if mixture is None:
        if config.experts in carriers:
            raise InputError(f"experts={config.experts!r}: no mixture of experts is edited; omit experts")
        return
    if config.rule != RECURSIVE and config.experts not in carriers:
        raise InputError(
            f"rule={config.rule!r}: {mixture} is a mixture of experts, whose experts this rule edits separately; set "
            f"experts to one of {', '.join(map(repr, carriers))}, or use rule={RECURSIVE!r}"
        )
    if config.experts == "shared":
        for projection in projections:
            if projection.layout is not None and not projection.layout.shared:
                raise InputError(f"experts='shared': {projection.name} has no shared expert; use 'split' or 'top'")
    for setting, given, supported in (
        ("contexts.rows", config.contexts.rows or "contexts", "contexts"),
        ("stored_rows", config.stored_rows if config.stored_rows == "fp16" else "full", "full"),
    ):
        if given != supported:
            raise InputError(
                f"{setting}={given!r}: {mixture} is a mixture of experts, which requires {setting}={supported!r}: each "
                "context reaches experts of its own"
            )


def _single_layer(
    model: PreTrainedModel, projections: Sequence[Projection], config: EditConfig
) -> Sequence[Projection]:
    """Returns the last projection: in this architecture several layers cannot share a change."""
    reason = (
        f"{type(model).__name__} normalizes or scales the output of a projection before it adds it to the residual "
        "stream, so that a change cannot be distributed over layers"
    )
    if config.layers is not None:
        raise ModelError(f"layers={config.layers}: {reason}; pass one layer")
    logger.info("%s; only layer %d is edited", reason, projections[-1].layer)
    return projections[-1:]


def _with_chat(tokenizer: PreTrainedTokenizerBase, config: EditConfig) -> EditConfig:
    """Returns the settings with the chat contexts that are used.

    Raises:
        InputError: chat contexts are requested, and the tokenizer has no chat template.
    """
    chat = config.contexts.chat
    if chat is None:
        used = CHAT_FORMS if config.effective_rows == "contexts" and supports_chat(tokenizer) else ()
        return config.replace(contexts={"chat": used})
    if chat and not supports_chat(tokenizer):
        raise InputError(
            f"contexts.chat={chat!r}: the tokenizer has no chat template that accepts a message; omit contexts.chat"
        )
    return config


def _with_sampled_contexts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EditConfig
) -> EditConfig:
    """Returns the settings with the context prefixes that the model generates."""
    config = _with_chat(tokenizer, config)
    contexts = config.contexts
    if not contexts.samples:
        return config
    samples = sample(model, tokenizer, texts=contexts.samples, length=contexts.sample_tokens + 1, seed=contexts.seed)
    texts = [str(tokenizer.decode(drawn.ids, skip_special_tokens=True)).strip() for drawn in samples]
    distinct = [text for text in dict.fromkeys(texts) if text and text not in contexts.prefixes]
    if len(distinct) < len(texts):
        logger.warning(
            "%d of %d sampled context prefixes are used; the others are blank or duplicates", len(distinct), len(texts)
        )
    return config.replace(contexts={"prefixes": (*contexts.prefixes, *distinct), "samples": 0})
