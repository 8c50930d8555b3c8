"""Models with random weights for timing, which does not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "random": {  # 49 million parameters
        "vocab_size": 32_000,
        "hidden_size": 512,
        "intermediate_size": 1088,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
    },
}
"""Arguments of `LlamaConfig` by name."""


def random_llama(name: str, device: str, *, seed: int = 0) -> Any:
    """Returns a Llama with one of `SHAPES`, in bfloat16 if it is large, else in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[name]
    torch.manual_seed(seed)
    config = LlamaConfig(initializer_range=shape["hidden_size"] ** -0.5, **shape)
    large = shape["hidden_size"] >= 4096
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if large else torch.float32)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()
