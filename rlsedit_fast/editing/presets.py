"""Published settings of published models, recognised by their shape."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GENERIC = "generic"
"""`EditConfig`'s settings; a command that is given it takes layers by the depth, of a model that is recognised too."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What was published for a model (MEMIT's and AlphaEdit's settings), and the shape by which it is recognised.

    Two models of one architecture and shape, such as Llama-3 and Llama-3.1 8B, are one to a preset.

    Attributes:
        name: as `preset` takes it.
        model_type: the architecture, as transformers calls it.
        blocks: number of blocks.
        hidden_size: width of the hidden state.
        intermediate_size: width within the MLP.
        layers: blocks that are edited.
        search_rate: Adam's learning rate.
        search_steps: of the value search.
        moment_weight: factor of `E[k k^T]`, that is mu^2.
    """

    name: str
    model_type: str
    blocks: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[int, ...]
    search_rate: float
    search_steps: int
    moment_weight: float

    def config(self) -> EditConfig:
        """The published settings, all of them explicit; context prefixes are `EditConfig`'s own.

        With lam = 0 only the anchors hold the weight: too few of them for their moment to be of full rank raise
        `PriorError`, which asks for more anchors or a lam above 0.
        """
        return EditConfig(
            layers=self.layers,
            batch_size=100,
            fact_token="subject_last",
            key_rows="mean",
            refine=0,
            lam=0.0,
            mu=math.sqrt(self.moment_weight),
            search_descent="adam",
            search_rate=self.search_rate,
            search_steps=self.search_steps,
            search_stop="loss",
            search_stop_loss=0.05,
            clamp=0.75,
            kl_factor=0.0625,
            kl_prompts=("{} is a",),
            weight_decay=0.5,
            same_subject="separate",
        )


def _llama_like(name: str, model_type: str, blocks: int, hidden: int, inner: int, layers: range) -> Preset:
    return Preset(
        name=name,
        model_type=model_type,
        blocks=blocks,
        hidden_size=hidden,
        intermediate_size=inner,
        layers=tuple(layers),
        search_rate=0.1,
        search_steps=25,
        moment_weight=15_000,
    )


PRESETS: dict[str, Preset] = {
    known.name: known
    for known in (
        Preset(
            name="gpt2-xl",
            model_type="gpt2",
            blocks=48,
            hidden_size=1600,
            intermediate_size=6400,
            layers=tuple(range(13, 18)),
            search_rate=0.5,
            search_steps=20,
            moment_weight=20_000,
        ),
        Preset(
            name="gpt-j-6b",
            model_type="gptj",
            blocks=28,
            hidden_size=4096,
            intermediate_size=16384,
            layers=tuple(range(3, 9)),
            search_rate=0.5,
            search_steps=25,
            moment_weight=15_000,
        ),
        _llama_like("llama-2-7b", "llama", 32, 4096, 11008, range(4, 9)),
        _llama_like("llama-3-8b", "llama", 32, 4096, 14336, range(4, 9)),
        _llama_like("llama-3.2-3b", "llama", 28, 3072, 8192, range(2, 7)),
        _llama_like("qwen2.5-7b", "qwen2", 28, 3584, 18944, range(7, 12)),
    )
}
"""By name."""


def recognise(model_config: PretrainedConfig) -> Preset | None:
    """The preset of a model's architecture and shape, None where there is none; its name and path are not looked at."""
    text = model_config.get_text_config()
    # GPT-2's and GPT-J's settings call the width n_inner, and leave it out where it is four times the hidden size.
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    shape = (text.model_type, text.num_hidden_layers, text.hidden_size, inner)
    for known in PRESETS.values():
        if shape == (known.model_type, known.blocks, known.hidden_size, known.intermediate_size):
            return known
    return None


def preset(name: str, **changes: Any) -> EditConfig:
    """Settings by name: `published`'s, or for `generic` `EditConfig`'s defaults.

    Raises:
        InputError: no such preset or setting, or a value that cannot be meant.
    """
    if name != GENERIC:
        return published(name, **changes)
    _check(changes)
    return EditConfig(**changes)


def published(name: str, **changes: Any) -> EditConfig:
    """The published settings of a model by its preset's name, with `changes` to fields of `EditConfig`.

    Raises:
        InputError: no such preset or setting, or a value that cannot be meant.
    """
    if name not in PRESETS:
        raise InputError(
            f"no preset {name!r}; there are {', '.join(PRESETS)}, and {GENERIC} settings for any other model"
        )
    _check(changes)
    return replace(PRESETS[name].config(), **changes)


def _check(changes: dict[str, Any]) -> None:
    known = [field.name for field in fields(EditConfig)]
    for name in changes:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise InputError(f"no setting {name!r}; {f'did you mean {near[0]!r}?' if near else 'see EditConfig'}")
