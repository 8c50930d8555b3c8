"""Tiny random models of architectures with more than one kind of block or more than text, for the tests of families."""

from __future__ import annotations

import copy

import torch

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_conv": 3}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SECTIONS = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
NEMOTRON = ["mamba", "mlp", "attention", "mlp", "mamba", "mlp"]


def without(settings, *names):
    return {name: value for name, value in settings.items() if name not in names}


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 8, "patch_size": 4}
QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
QWEN_IDS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
DOWN = "mlp.down_proj"

# name: (prefix of the classes, settings, projection within a block, blocks that have it)
TEXT_FAMILIES = {
    "olmo3": ("Olmo3", TEXT | {"sliding_window": 8}, DOWN, 4),
    "smollm3": ("SmolLM3", TEXT, DOWN, 4),
    "glm4": ("Glm4", TEXT | {"partial_rotary_factor": 0.5}, DOWN, 4),
    "phi4": ("Phi3", TEXT, DOWN, 4),
    "ministral3": ("Ministral3", TEXT, DOWN, 4),
    "exaone4": ("Exaone4", TEXT | {"sliding_window": 8, "sliding_window_pattern": 4}, DOWN, 4),
    "seed_oss": ("SeedOss", TEXT, DOWN, 4),
    "apertus": ("Apertus", TEXT, DOWN, 4),
    "cohere2": ("Cohere2", TEXT | {"sliding_window": 8}, DOWN, 4),
    "gemma3n": (
        "Gemma3n",
        TEXT
        | {
            "hidden_size_per_layer_input": 96,
            "laurel_rank": 96,
            "vocab_size_per_layer_input": 512,
            "altup_num_inputs": 3,
        }
        | {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 96},
        DOWN,
        4,
    ),
    "gemma4": (
        "Gemma4",
        TEXT | {"hidden_size_per_layer_input": 96, "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0},
        DOWN,
        4,
    ),
    "olmo_hybrid": ("OlmoHybrid", TEXT | DELTA | {"layer_types": HYBRID}, DOWN, 4),
    "qwen3_5_text": ("Qwen3_5", TEXT | DELTA | {"layer_types": HYBRID}, DOWN, 4),
    "qwen3_next": (
        "Qwen3Next",
        TEXT
        | DELTA
        | {"layer_types": HYBRID, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0, 1]},
        DOWN,
        2,
    ),
    "bamba": ("Bamba", TEXT | MAMBA2 | {"attn_layer_indices": [1]}, "feed_forward.down_proj", 4),
    "falcon_h1": ("FalconH1", TEXT | MAMBA2 | {"mamba_d_ssm": 64}, "feed_forward.down_proj", 4),
    "granite4": (
        "GraniteMoeHybrid",
        TEXT
        | MAMBA2
        | {"num_local_experts": 0, "shared_intermediate_size": 96, "layer_types": ["mamba", "attention"] * 2},
        "shared_mlp.output_linear",
        4,
    ),
    "granite4_experts": (
        "GraniteMoeHybrid",
        TEXT
        | MAMBA2
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 96}
        | {"layer_types": ["mamba", "attention"] * 2},
        "shared_mlp.output_linear",
        4,
    ),
    "jamba": (
        "Jamba",
        TEXT
        | {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
        | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_d_conv": 3, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
        "feed_forward.down_proj",
        2,
    ),
    "nemotron_h": (
        "NemotronH",
        TEXT
        | {"layers_block_type": NEMOTRON, "num_hidden_layers": 6, "mamba_num_heads": 4, "mamba_head_dim": 16}
        | {"n_groups": 1, "ssm_state_size": 8, "conv_kernel": 3, "use_mamba_kernels": False},
        "mixer.down_proj",
        3,
    ),
    "lfm2": (
        "Lfm2",
        TEXT | {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        "feed_forward.w2",
        4,
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        without(TEXT, "num_key_value_heads") | {"lru_width": 32, "attention_window_size": 16, "conv1d_width": 3},
        "mlp_block.down_proj",
        4,
    ),
}

# name: (prefix of the classes, settings of the text, further settings)
MULTIMODAL = {
    "qwen3_5": (
        "Qwen3_5",
        TEXT | DELTA | {"layer_types": HYBRID},
        {"vision_config": QWEN_VISION | {"patch_size": 4, "num_position_embeddings": 16}} | QWEN_IDS,
    ),
    "llama4": (
        "Llama4",
        TEXT
        | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "moe_layers": [3]}
        | {"attention_chunk_size": 32},
        {
            "vision_config": VISION
            | PATCHES
            | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
            "image_token_index": 5,
        },
    ),
    "gemma3": (
        "Gemma3",
        TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 8},
        {"vision_config": VISION | PATCHES, "mm_tokens_per_image": 4}
        | {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        TEXT | {"rope_scaling": SECTIONS | {"type": "default"}},
        {"vision_config": QWEN_VISION | {"patch_size": 4, "fullatt_block_indexes": [1]}} | QWEN_IDS,
    ),
    "qwen3_vl": (
        "Qwen3VL",
        TEXT | {"rope_scaling": SECTIONS},
        {
            "vision_config": QWEN_VISION
            | {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        }
        | QWEN_IDS,
    ),
    "mistral3": (
        "Mistral3",
        TEXT | {"model_type": "mistral", "sliding_window": None},
        {"vision_config": VISION | PATCHES | {"model_type": "pixtral", "head_dim": 16}, "image_token_index": 5},
    ),
    "llava": (
        "Llava",
        TEXT | {"model_type": "llama"},
        {"vision_config": VISION | PATCHES | {"model_type": "clip_vision_model"}, "image_token_index": 5},
    ),
}

TEXT_CONFIGS = {"Gemma3n", "Gemma4", "Qwen3_5"}
"""Prefixes whose config of the text model has a name of its own."""


def make(name: str, vocabulary: int, dtype: torch.dtype = torch.float32, **changes):
    """Creates a model; `changes` replace settings of the text."""
    import transformers

    torch.manual_seed(len(name))
    prefix, settings, *others = copy.deepcopy((TEXT_FAMILIES | MULTIMODAL)[name])
    settings = settings | {"vocab_size": vocabulary} | changes
    if name in MULTIMODAL:
        config = getattr(transformers, f"{prefix}Config")(text_config=settings, **others[0])
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    else:
        kind = f"{prefix}TextConfig" if prefix in TEXT_CONFIGS else f"{prefix}Config"
        model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, kind)(**settings))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()
