"""Published settings of models, which are recognized by architecture and shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsedit_fast.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GENERIC = "generic"
"""The defaults of `EditConfig`."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Published settings of a model (MEMIT, AlphaEdit), and the shape by which the model is recognized.

    Models of one architecture and shape, such as Llama-3 8B and Llama-3.1 8B, share a preset.

    Attributes:
        name: name of the preset.
        model_type: architecture, as transformers names it.
        blocks: number of decoder layers.
        hidden_size: size of the hidden state.
        intermediate_size: size within the MLP.
        layers: edited layers.
        learning_rate: learning rate of Adam.
        steps: steps of the value search.
        moment_weight: factor of `E[k k^T]`, equal to `mu^2`.
    """

    name: str
    model_type: str
    blocks: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[int, ...]
    learning_rate: float
    steps: int
    moment_weight: float

    def settings(self) -> dict[str, Any]:
        """Returns the published settings as arguments of `EditConfig`; context prefixes keep their defaults.

        With lam = 0 only the anchors hold the weight: too few anchors for a moment of full rank raise `PriorError`.
        """
        return {
            "layers": self.layers,
            "batch_size": 100,
            "fact_token": "subject_last",
            "contexts": {"rows": "mean"},
            "refine": 0,
            "prior": {"lam": 0.0, "mu": math.sqrt(self.moment_weight)},
            "search": {
                "optimizer": "adam",
                "learning_rate": self.learning_rate,
                "steps": self.steps,
                "stop": "loss",
                "stop_loss": 0.05,
                "clamp": 0.75,
                "kl_prompts": ("{} is a",),
                "loss": {"kl_factor": 0.0625, "weight_decay": 0.5},
            },
            "same_subject": "separate",
        }


def _llama_like(name: str, model_type: str, blocks: int, hidden: int, inner: int, layers: range) -> Preset:
    return Preset(
        name=name,
        model_type=model_type,
        blocks=blocks,
        hidden_size=hidden,
        intermediate_size=inner,
        layers=tuple(layers),
        learning_rate=0.1,
        steps=25,
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
            learning_rate=0.5,
            steps=20,
            moment_weight=20_000,
        ),
        Preset(
            name="gpt-j-6b",
            model_type="gptj",
            blocks=28,
            hidden_size=4096,
            intermediate_size=16384,
            layers=tuple(range(3, 9)),
            learning_rate=0.5,
            steps=25,
            moment_weight=15_000,
        ),
        _llama_like("llama-2-7b", "llama", 32, 4096, 11008, range(4, 9)),
        _llama_like("llama-3-8b", "llama", 32, 4096, 14336, range(4, 9)),
        _llama_like("llama-3.2-3b", "llama", 28, 3072, 8192, range(2, 7)),
        _llama_like("qwen2.5-7b", "qwen2", 28, 3584, 18944, range(7, 12)),
    )
}
"""By name."""


def published(name: str) -> dict[str, Any]:
    """Returns the settings of a preset as arguments of `EditConfig`; none for `generic`.

    Raises:
        InputError: there is no such preset.
    """
    if name == GENERIC:
        return {}
    if name not in PRESETS:
        known = (*PRESETS, GENERIC)
        raise InputError(f"unknown preset {name!r}: expected one of {', '.join(known)}{did_you_mean(name, known)}")
    return PRESETS[name].settings()


def find_preset(model_config: PretrainedConfig) -> Preset | None:
    """Returns the preset of a model's architecture and shape, or None; the model's name and path are ignored."""
    text = model_config.get_text_config()
    # The configs of GPT-2 and GPT-J name the size n_inner and omit it if it is four times the hidden size.
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    shape = (text.model_type, text.num_hidden_layers, text.hidden_size, inner)
    for known in PRESETS.values():
        if shape == (known.model_type, known.blocks, known.hidden_size, known.intermediate_size):
            return known
    return None
