"""What inference servers accept as a LoRA adapter."""

from __future__ import annotations

from typing import Literal, get_args

from rlsedit_fast.errors import InputError, ModelError

Engine = Literal["vllm"]
"""Servers with restrictions on LoRA adapters.

Example:
    >>> from typing import get_args
    >>> from rlsedit_fast.export import Engine
    >>> get_args(Engine)
    ('vllm',)
"""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of `--max-lora-rank` in vLLM.

Example:
    >>> from rlsedit_fast.export import VLLM_RANKS
    >>> next(rank for rank in VLLM_RANKS if rank >= 150)  # 50 edits with three rows each
    256
"""

_VLLM_WITHOUT_LORA = ("GPT2LMHeadModel", "GPTJForCausalLM", "FalconForCausalLM", "StableLmForCausalLM")
"""Classes of the supported models that vLLM 0.32 serves without LoRA."""

_RELOAD = "serve an edited checkpoint instead: write it with --out (Python: editor.save_pretrained) and load it with "
_RELOAD += "`rlsedit deploy --checkpoint` (Python: rlsedit_fast.serving.VLLM.reload_weights)"


def check_engine(engine: str | None, architecture: str = "") -> None:
    """Checks the name of a server, and that it serves a model with LoRA.

    Args:
        engine: name of the server, or None.
        architecture: class name of the model; empty if unknown.

    Raises:
        InputError: the server is not known.
        ModelError: the server does not load adapters for this class of models.
    """
    if engine is None:
        return
    if engine not in get_args(Engine):
        raise InputError(f"engine={engine!r}: expected {' or '.join(map(repr, get_args(Engine)))}, or None")
    if architecture in _VLLM_WITHOUT_LORA:
        raise ModelError(f"vLLM serves {architecture} without LoRA, so no adapter was written", hint=_RELOAD)


def padded_rank(rank: int, engine: str | None) -> int:
    """Returns the smallest rank of at least `rank` that the server takes; `rank` itself if `engine` is None.

    Raises:
        InputError: the server takes no rank as large as this.
    """
    if engine is None:
        return rank
    for allowed in VLLM_RANKS:
        if allowed >= rank:
            return allowed
    raise InputError(
        f"the weight change has rank {rank}, and vLLM takes adapters of rank {VLLM_RANKS[-1]} at most; nothing was "
        "written",
        hint=f"{_RELOAD}, or limit the rank with --rank {VLLM_RANKS[-1]} (Python: rank={VLLM_RANKS[-1]}), and read "
        "the error of the approximation in the report",
    )
