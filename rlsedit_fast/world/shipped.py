"""Loads the bundled demo model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_DIR = Path(__file__).parent / "model"
"""Folder of the demo model.

Example:
    >>> from rlsedit_fast.world import MODEL_DIR
    >>> (MODEL_DIR / "config.json").exists()
    True
"""


def load_demo_model(directory: Path = MODEL_DIR) -> tuple[PreTrainedModel, Any]:
    """Loads the demo model and its tokenizer.

    Args:
        directory: folder of the model, such as the output of `python -m rlsedit_fast.world train`.

    Returns:
        The model in evaluation mode, on the CPU, in float32 (stored as float16), and the tokenizer.

    Example:
        >>> from rlsedit_fast.world import load_demo_model
        >>> model, tokenizer = load_demo_model()
        >>> model.config.num_hidden_layers, tokenizer("Toze Lado")["input_ids"][0] == tokenizer.bos_token_id
        (4, True)
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)
