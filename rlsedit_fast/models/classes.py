"""Chooses the class that holds the whole model of a checkpoint.

`AutoModelForCausalLM` loads only the text half of some multimodal checkpoints, and none of others, although their
configs name the class of the whole model in `architectures`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from rlsedit_fast.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForVision2Seq",
)
"""Auto classes of models that generate text, in the order in which they are tried; versions lack some of them."""

_CODE_CLASSES = (*_AUTO_CLASSES, "AutoModel")
"""Auto classes under which code of a checkpoint may register a model that generates text."""


def whole_model_class(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Any:
    """Returns the class with which a whole model is loaded.

    Args:
        config: config of the model.
        trust_remote_code: whether code of the checkpoint may be run.

    Returns:
        An Auto class of transformers whose class for this config is the one in `config.architectures`, or else that
        class itself. If the name is unknown or missing, the first Auto class that holds all parts of the config.

    Raises:
        ModelError: transformers has no class of a language model for the config.

    Example:
        >>> from rlsedit_fast.models.classes import whole_model_class
        >>> from transformers import LlamaConfig, LlavaConfig
        >>> whole_model_class(LlamaConfig(architectures=["LlamaForCausalLM"])).__name__
        'AutoModelForCausalLM'
        >>> whole_model_class(LlavaConfig(architectures=["LlavaForConditionalGeneration"])).__name__
        'AutoModelForImageTextToText'
    """
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    if trust_remote_code and (found := _of_checkpoint(config, names)) is not None:
        return found
    offered = list(_offered(config))
    for auto, kinds in offered:
        if any(kind.__name__ in names for kind in kinds):
            return auto
    for name in names:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and getattr(kind, "config_class", None) is type(config):
            if cast(Any, kind).can_generate():
                return kind
            if "For" in name.removesuffix("Model") and not name.endswith("ForPreTraining"):
                raise ModelError(
                    f"the config names the class {name}, which does not generate text; pass a language model"
                )
    for auto, kinds in offered:
        if any(getattr(kind, "config_class", None) is type(config) for kind in kinds):
            return auto
    if offered:
        return offered[0][0]
    code = " with trust_remote_code" if getattr(config, "auto_map", None) else ""
    raise ModelError(
        f"transformers {transformers.__version__} has no class of a language model for {_named(config, names)}"
        f"{f'; the checkpoint has code of its own, which runs only{code}' if code else ''}",
        hint="pass --trust-remote-code (Python: trust_remote_code=True) if you trust the code of the checkpoint"
        if code
        else "use a version of transformers that supports this model, or pass another model",
    )


def from_config(
    found: Any, config: PretrainedConfig, *, dtype: object = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Creates a model with random weights.

    Args:
        found: class of `whole_model_class`.
        config: config of the model.
        dtype: dtype of the weights.
        trust_remote_code: whether code of the checkpoint may be run.

    Returns:
        The model.
    """
    if hasattr(found, "from_config"):  # an Auto class
        model: PreTrainedModel = found.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        return model
    model = found._from_config(config, dtype=dtype)
    return model


def _of_checkpoint(config: PretrainedConfig, names: list[str]) -> Any:
    """Returns the Auto class under which code of the checkpoint registers the model, or None."""
    import transformers

    registered: dict[str, Any] = getattr(config, "auto_map", None) or {}
    known = [name for name in _CODE_CLASSES if name in registered and hasattr(transformers, name)]
    named = [name for name in known if str(registered[name]).rpartition(".")[2] in names]
    # AutoModel is usually the model without its head.
    chosen = [*named, *(name for name in known if name != "AutoModel")]
    return getattr(transformers, chosen[0]) if chosen else None


def _offered(config: PretrainedConfig) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields the Auto classes that load a model with this config, with the classes of the models."""
    import transformers

    for name in _AUTO_CLASSES:
        auto = getattr(transformers, name, None)
        if auto is not None and type(config) in auto._model_mapping:
            kinds = auto._model_mapping[type(config)]
            yield auto, tuple(kinds) if isinstance(kinds, list | tuple) else (kinds,)


def _named(config: PretrainedConfig, names: list[str]) -> str:
    return f"{', '.join(names) or type(config).__name__} (model type {config.model_type!r})"
