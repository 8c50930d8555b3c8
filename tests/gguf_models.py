"""Writes tiny transformers models as GGUF files, as the converter of llama.cpp does."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
MERGES = ("h e", "Ġ x", "Ġ Q", "Ġ 7")
SPECIAL = ("<unk>", "<s>", "</s>")


def vocabulary(architecture):
    """Returns special tokens and one token per byte, or per character with a SentencePiece tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    if architecture.startswith(("gemma", "phi3")):
        return [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(at) for at in range(33, 127))]
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]


def write_model(path, model, *, types=None, alignment=None):
    """Writes a model with F32 norms and other tensors as Q8_0.

    Args:
        path: the file.
        model: the model; its vocabulary is that of `vocabulary`.
        types: instead, types of some tensors by the end of their names; a tuple of type and bytes is written as is.
        alignment: alignment of the tensors.
    """
    kind = model.config.model_type
    architecture = ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("Tiny")
    writer.add_array("general.tags", ["tiny", "Łódź"])
    for key, name in GGUF_TO_TRANSFORMERS_MAPPING["config"][architecture].items():
        value = _setting(model.config, name)
        if value is not None and not isinstance(value, list | dict):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    _add_tokenizer(writer, vocabulary(architecture), "gpt2" if "he" in vocabulary(architecture) else "llama")
    for name, value in _tensors(model, architecture).items():
        wanted = next((kind for end, kind in (types or {}).items() if name.endswith(end)), None)
        if isinstance(wanted, tuple):
            writer.add_tensor(name, wanted[1], raw_dtype=wanted[0])
            continue
        small = value.ndim == 1 or value.shape[-1] % 32
        chosen = Type.F32 if small else wanted if wanted is not None else Type.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _setting(config, name):
    if name is None or name == -1:
        return None
    if name == "rope_theta":
        return float((config.rope_parameters or {}).get(name, 10_000.0))
    if name == "n_ctx":
        return config.n_positions
    return getattr(config, name, None)


def _add_tokenizer(writer, tokens, model):
    writer.add_tokenizer_model(model)
    if model == "gpt2":
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(list(MERGES))
    else:
        writer.add_token_scores([-float(at) for at in range(len(tokens))])
    writer.add_token_list(tokens)
    kinds = [6 if token.startswith("<0x") else 1 for token in tokens]
    writer.add_token_types([3, 3, 3, *kinds[3:]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def _tensors(model, architecture):
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = bool(model.config.tie_word_embeddings)
    found = {}
    for name, tensor in model.state_dict().items():
        base, _, end = name.rpartition(".")
        mapped = table.get_name(base) or table.get_name(base.partition(".")[2])
        if mapped is None or (base == "lm_head" and tied):
            continue
        value = tensor.float().numpy()
        if architecture == "llama" and mapped.endswith(("attn_q", "attn_k")):
            count = model.config.num_attention_heads if mapped.endswith("q") else model.config.num_key_value_heads
            value = value.reshape(count, 2, value.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and "norm" in mapped:
            value = value + 1
        transposed = ("attn_qkv", "ffn_down", "ffn_up", "attn_output")
        if architecture == "gpt2" and end == "weight" and mapped.endswith(transposed):
            value = value.T
        found[f"{mapped}.{end}"] = value
    return found


def tiny_family(name):
    """Returns a tiny random model of an architecture, with the sizes that transformers assumes for a GGUF file."""
    from .conftest import MAKERS, OTHER_FAMILIES, maker

    architecture = ARCHITECTURES.get(name, name)
    count = len(vocabulary(architecture))
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(4)
        return GPT2LMHeadModel(GPT2Config(vocab_size=count, n_embd=64, n_layer=4, n_head=4)).eval()
    sizes = {"falcon": {"ffn_hidden_size": 256}, "qwen3": {"head_dim": 128}}
    if name in sizes:
        prefix, settings = OTHER_FAMILIES[name]
        return maker(prefix, settings | sizes[name], seed=5)(count)
    return MAKERS[name](count)


def k_quant(rows, columns, seed=0):
    """Returns random data of type Q4_K, which the package gguf reads and cannot write."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
    for at in (0, 2):  # two scales per block, float16
        blocks[..., at : at + 2] = np.full((rows, columns // 256, 1), 0.002, np.float16).view(np.uint8)
    return Type.Q4_K, blocks.reshape(rows, -1)


def tiny_llama(*, inner=96, seed=3):
    """Returns a random Llama for `vocabulary("llama")`, whose last layer determines the next token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary("llama")),
        hidden_size=64,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.02,
        head_dim=16,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model
