"""Tiny random models of both weight layouts; tests marked gpu are skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from rlsedit_fast.world.tokens import build_tokenizer


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_llama(vocabulary: int, dtype: torch.dtype = torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_gpt2(vocabulary: int, dtype: torch.dtype = torch.float32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=64,
        n_inner=64,
        n_layer=4,
        n_head=4,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).to(dtype).eval()


MAKERS = {"llama": make_llama, "gpt2": make_gpt2}


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(params=sorted(MAKERS))
def model(request, tokenizer):
    """A fresh tiny model: Llama's nn.Linear, and GPT-2's Conv1D with a square weight."""
    return MAKERS[request.param](len(tokenizer))


@pytest.fixture
def make_model(tokenizer):
    return lambda name, dtype=torch.float32: MAKERS[name](len(tokenizer), dtype)
