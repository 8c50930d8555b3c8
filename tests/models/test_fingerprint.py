"""A fingerprint depends only on the weights and the config."""

import json

import pytest
import torch

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.fingerprint import checksum, fingerprint, settings

BLOCK = 1 << 16  # words


def load(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


def flip(tensor, index, bit=0):
    size = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    tensor.data.view(-1).view(size)[index] ^= 1 << bit


def test_saving_and_loading_keeps_the_fingerprint(family, make_model, tmp_path):
    model = make_model(family, torch.bfloat16)  # rounds buffers that are recomputed on loading
    model.save_pretrained(tmp_path)
    assert fingerprint(load(tmp_path, dtype="auto")) == fingerprint(model)


def test_models_of_one_folder_name_differ(make_model, tmp_path):
    model = make_model("llama")
    found = []
    for parent in ("one", "two"):
        model.save_pretrained(tmp_path / parent / "checkpoint")
        found.append(fingerprint(load(tmp_path / parent / "checkpoint")))
        flip(model.model.layers[2].mlp.up_proj.weight, -1)
    assert found[0] != found[1]
    assert all(len(digest) == 64 and int(digest, 16) for digest in found)


def test_swapped_rows_change_the_fingerprint(make_model):
    model = make_model("llama", torch.bfloat16)
    before = fingerprint(model)
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight[[3, 11]] = weight[[11, 3]]
    assert fingerprint(model) != before


def test_dtype_at_loading_differs(make_model, tmp_path):
    make_model("gpt2", torch.bfloat16).save_pretrained(tmp_path)
    narrow, wide = (fingerprint(load(tmp_path, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert narrow != wide


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("llama", "rms_norm_eps", 1e-5), ("llama", "num_attention_heads", 2), ("mistral", "sliding_window", 9)],
)
def test_config_values_change_the_fingerprint(make_model, name, setting, value):
    model = make_model(name)
    before = fingerprint(model)
    setattr(model.config, setting, value)
    assert fingerprint(model) != before


def test_rotary_base_differs(make_model):
    model = make_model("llama")
    before = settings(model.config.to_dict())
    changed = json.loads(json.dumps(model.config.to_dict()).replace("10000.0", "500000.0"))
    assert settings(changed) != before


def test_unused_config_values_are_ignored(make_model):
    model = make_model("llama")
    before = fingerprint(model)
    model.config._name_or_path = "elsewhere"
    model.config.architectures = ["Other"]
    model.config.use_cache = False
    model.config.eos_token_id = 7
    model.config.initializer_range = 0.5
    model.requires_grad_(False)
    assert fingerprint(model) == before


def test_settings_do_not_depend_on_the_transformers_version():
    four = {
        "hidden_size": 64,
        "rope_theta": 500000,
        "rope_scaling": {"type": "llama3", "factor": 8.0},
        "attention_bias": False,
        "temperature": 1.0,
        "torch_dtype": "float32",
        "transformers_version": "4.56.2",
        "layer_types": ["full_attention"] * 2,
    }
    five = {
        "hidden_size": 64,
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0},
        "dtype": torch.bfloat16,
        "sliding_window": None,
        "transformers_version": "5.23.0",
    }
    assert settings(four) == settings(five) != {}
    local = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    nested = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert settings(local) == settings({"rope_parameters": nested})
    assert settings({"text_config": four}) == settings({"text_config": five}) != settings({})


def test_fingerprint_with_original_weights(make_model):
    model = make_model("gpt2", torch.bfloat16)
    before = fingerprint(model)
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("mlp.c_proj.weight"))
    original = weight.detach().clone()
    weight.data += 1
    assert fingerprint(model) != before
    assert fingerprint(model, instead={name: original.T.contiguous().T}) == before
    with pytest.raises(ModelError, match="nowhere"):
        fingerprint(model, instead={"nowhere": original})


def test_tied_weights_are_read_once(make_model):
    model = make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = fingerprint(model)
    model.transformer.wte.weight = torch.nn.Parameter(model.transformer.wte.weight.clone())
    assert fingerprint(model) != before, "an untied head is a separate weight"
    other = make_model("gpt_neox")
    before = fingerprint(other)
    head = other.get_output_embeddings()
    (name,) = (name for name, module in other.named_modules() if module is head)
    delattr(other, name)
    other.another_name = head
    other.get_output_embeddings = lambda: head
    assert fingerprint(other) == before


def test_weights_on_the_meta_device_raise(make_model):
    model = make_model("llama")
    model.model.norm.to("meta")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is on the meta device"):
        fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_bit_and_every_swap_changes_the_checksum(dtype):
    torch.manual_seed(0)
    size = 2 * BLOCK + 3
    tensor = torch.randn(size).to(dtype)
    before = checksum(tensor)
    for index in (0, 1, BLOCK, 2 * BLOCK - 1, size - 1):
        for bit in range(8 * tensor.element_size()):
            changed = tensor.clone()
            flip(changed, index, bit)
            assert checksum(changed) != before
    ones = torch.ones(size, dtype=dtype)
    for first, second in ((0, 2), (0, 1), (1, 1 + (1 << 15)), (0, 1 << 16), (5, size - 1)):
        seen = set()
        for at in (first, second):
            for value in (1.5, -1.0, 2.0, float("nan")):
                changed = ones.clone()
                changed[at] = value
                seen.add(checksum(changed))
        assert len(seen) == 8


def test_rows_of_a_pattern_do_not_cancel():
    eye = torch.eye(300)  # all rows have the same sum; two blocks of words
    before = checksum(eye)
    for first, second in ((0, 1), (2, 66), (10, 290), (0, 256)):
        changed = eye.clone()
        changed[[first, second]] = eye[[second, first]]
        assert checksum(changed) != before


def test_views_are_read_in_row_major_order():
    base = torch.randn(300, 301).bfloat16()
    for view in (base.T, base[:, 1:], base[1:, 3::2], base.flatten()[1:], base[0, 0], base[:0]):
        assert checksum(view) == checksum(view.clone(memory_format=torch.contiguous_format))
    assert checksum(base.T) != checksum(base)
    assert checksum(base[:0]) == b""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_device_does_not_matter(dtype):
    tensor = (torch.randn(700, 701) * 50).to(dtype)
    assert checksum(tensor.cuda()) == checksum(tensor)
