"""Tiny random models of the supported architectures; tests marked gpu are skipped without a GPU."""

from __future__ import annotations

import copy
import os
import signal

import pytest
import torch

from rlsedit_fast.world.tokens import build_tokenizer

os.environ["RLSEDIT_TUNE"] = "0"  # the tests of tuning set it; subprocesses inherit it


def pytest_configure():
    """Restores the default handler of Ctrl-C, which is ignored if the tests run in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Runs the tests with slow setups first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: "tests/real/" not in item.path.as_posix())


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def cast(model, dtype: torch.dtype):
    """Casts only the parameters: `model.to(dtype)` would also round the float32 rotary frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


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
    return cast(LlamaForCausalLM(config).eval(), dtype)


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
    return cast(GPT2LMHeadModel(config).eval(), dtype)


# Sizes, with the names of all configurations except GPT-2 and GPT-J; the ids are within the smallest vocabulary.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 16}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# name: (prefix of the configuration's and the model's class, its settings)
OTHER_FAMILIES = {
    "gptj": (
        "GPTJ",
        {"n_embd": 64, "n_inner": 96, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
        | {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoX", SIZES),
    "opt": (
        "OPT",
        {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "initializer_range")}
        | {"ffn_dim": 96, "init_std": 0.2, "word_embed_proj_dim": 64},
    ),
    "llama3": ("Llama", GROUPED | {"rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", HEADS),
    "gemma2": ("Gemma2", HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "gemma3": ("Gemma3", HEADS | {"query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi3": ("Phi3", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "falcon": ("Falcon", SIZES | {"ffn_hidden_size": 96, "multi_query": True, "parallel_attn": True}),
    "falcon_new": ("Falcon", SIZES | {"ffn_hidden_size": 96, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "stablelm": ("StableLm", GROUPED),
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURES = {
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 16}),
    "gpt_oss": (
        "GptOss",
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        SIZES
        | LATENT
        | GROUPS
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_key_value_heads": 4, "topk_group": 2},
    ),
    "llama4": (
        "Llama4",
        HEADS
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "moe_layers": [1, 2, 3]},
    ),
    "olmoe": ("Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (
        "GraniteMoe",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.5},
    ),
    "ernie": (
        "Ernie4_5_Moe",
        GROUPED
        | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1},
    ),
    "glm4_moe": (
        "Glm4Moe",
        HEADS | GROUPS | {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "topk_group": 2},
    ),
    "minimax": (
        "MiniMax",
        HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 4},
    ),
}


def maker(prefix: str, settings: dict, seed: int):
    def make(vocabulary: int, dtype: torch.dtype = torch.float32):
        import transformers

        torch.manual_seed(seed)
        # A configuration may modify its arguments.
        text = prefix in ("Gemma3", "Llama4")
        config = getattr(transformers, f"{prefix}TextConfig" if text else f"{prefix}Config")(
            vocab_size=vocabulary, **copy.deepcopy(settings)
        )
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
        return cast(model, dtype)

    return make


LAYOUTS = {"llama": make_llama, "gpt2": make_gpt2}
FAMILIES = (*LAYOUTS, *OTHER_FAMILIES)
MAKERS = LAYOUTS | {
    name: maker(prefix, settings, seed)
    for seed, (name, (prefix, settings)) in enumerate((OTHER_FAMILIES | MIXTURES).items(), start=5)
}


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(params=sorted(LAYOUTS))
def model(request, tokenizer):
    """A new tiny model: Llama with nn.Linear, and GPT-2 with Conv1D and a square weight."""
    return MAKERS[request.param](len(tokenizer))


@pytest.fixture(params=FAMILIES)
def family(request):
    """The name of each architecture that the package recognizes, for `make_model`."""
    return request.param


@pytest.fixture(params=sorted(MIXTURES))
def mixture(request):
    """The name of each mixture of experts, for `make_model`."""
    return request.param


@pytest.fixture
def make_model(tokenizer):
    return lambda name, dtype=torch.float32: MAKERS[name](len(tokenizer), dtype)


@pytest.fixture(scope="session")
def state_bytes():
    """Returns a function that sums the bytes of a state's tensors, without its anchors and a weight edited in place."""

    def measure(state, in_place=None):
        master = [t for t in state._master.tensors if in_place is None or t.data_ptr() != in_place.data_ptr()]
        pending = [state._pending._rows, state._pending._signs]
        kept = [state._base, state._original, state._sketch.probe, state._sketch.image, *pending, *master]
        return sum(tensor.nbytes for tensor in kept)

    return measure
