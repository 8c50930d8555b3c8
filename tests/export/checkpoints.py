"""Tiny checkpoints with the files and tensors that published ones have, and changes of their weights."""

import json

import torch
from safetensors.torch import load_file, save_file

from rlsedit_fast.export import WeightChange
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.world.tokens import save_tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FILES = {
    "preprocessor_config.json": '{"do_resize": true}\n',
    "processor_config.json": '{"image_seq_length": 4}\n',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "LICENSE": "license\n",
    "modeling_own.py": "OWN = 1\n",
    ".gitattributes": "*.safetensors filter=lfs\n",
    "assets/picture.png": "picture",
}


def qwen35(vocabulary):
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    torch.manual_seed(0)
    linear = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads")}
    linear |= {f"linear_{name}_head_dim": 16 for name in ("key", "value")}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3_5Config(
        text_config=TEXT | linear | {"vocab_size": vocabulary},
        vision_config=vision | {"num_position_embeddings": 16},
        **{"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6},
    )
    return Qwen3_5ForConditionalGeneration(config).eval()


def gemma3(vocabulary):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=TEXT | {"vocab_size": vocabulary, "query_pre_attn_scalar": 16, "sliding_window": 8},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        **{"mm_tokens_per_image": 4, "image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5},
    )
    return Gemma3ForConditionalGeneration(config).eval()


def save_base(model, tokenizer, folder, *, extra=(), shards=None):
    """Saves a checkpoint with the files of `FILES`, and `extra` tensors that the class of the model does not use."""
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    save_tokenizer(tokenizer, folder)
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    index = folder / "model.safetensors.index.json"
    name = "model.safetensors"
    if index.exists():
        held = json.loads(index.read_text())
        name = max(held["weight_map"].values())
        held["weight_map"] |= dict.fromkeys(extra, name)
        index.write_text(json.dumps(held))
    if extra:
        tensors = load_file(folder / name)
        tensors |= {key: torch.full((4, 4), 0.5, dtype=model.dtype) for key in extra}
        save_file(tensors, folder / name, metadata={"format": "pt", "made_by": "a publisher"})
    return folder


def edit(model, layer=1, scale=0.05):
    """Changes the projection of a layer; returns the changes, as an editor does."""
    (projection,) = find_decoder(model).select([layer])
    changes = []
    for at, block in enumerate(projection.blocks):
        if projection.layout is not None and at % 2:  # an expert that no edit reaches
            continue
        original = block.detach().clone()
        generator = torch.Generator().manual_seed(layer + at)
        current = original.float() + scale * torch.randn(block.shape, generator=generator)
        block.copy_(current)
        name, transposed = projection.block_name(at)
        changes.append(WeightChange(name, original, block.detach(), current, transposed, projection.stack_of(at)))
    return changes
