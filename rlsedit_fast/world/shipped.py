"""Loads the bundled demo model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_DIR = Path(__file__).parent / "model"


def load_demo_model(directory: Path = MODEL_DIR) -> tuple[PreTrainedModel, Any]:
    """Loads the demo model in float32 (stored as float16) and its tokenizer from `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(directory, local_files_only=True)
