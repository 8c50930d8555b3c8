"""Mixtures of experts are found by structure, and keys times weights give their outputs."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.experts import ExpertProjection, check_mixture
from rlsedit_fast.models.passes import read_keys
from rlsedit_fast.models.projections import find_decoder

NAMES = {
    "mixtral": ("mlp", False, 0),
    "qwen2_moe": ("mlp", False, 40),
    "qwen3_moe": ("mlp", False, 0),
    "gpt_oss": ("mlp", True, 0),
    "deepseek_v3": ("mlp", False, 48),
    "llama4": ("feed_forward", True, 96),
    "olmoe": ("mlp", False, 0),
    "granitemoe": ("block_sparse_moe", False, 0),
    "ernie": ("mlp", False, 48),
    "glm4_moe": ("mlp", False, 48),
    "minimax": ("mlp", False, 0),
}


def runner(model, ids):
    return lambda: model(input_ids=ids, use_cache=False)


@pytest.fixture
def ids(tokenizer):
    return torch.randint(4, len(tokenizer), (1, 12), generator=torch.Generator().manual_seed(0))


def test_the_mixture_is_found_and_its_keys_give_its_outputs(make_model, mixture, ids):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(mixture, dtype)
        (projection,) = find_decoder(model).select([2])
        assert isinstance(projection, ExpertProjection)
        inner, transposed, shared = NAMES[mixture]
        assert projection.name == f"model.layers.2.{inner}"
        assert (projection.transposed, projection.layout.shared) == (transposed, shared)
        assert [tuple(block.shape) for block in projection.blocks][:4] == [(64, projection.layout.width)] * 4
        assert all(block.data_ptr() for block in projection.blocks)
        check_mixture(projection, runner(model, ids))


def test_blocks_are_views_of_the_model(make_model, mixture):
    model = make_model(mixture)
    (projection,) = find_decoder(model).select([2])
    for block in projection.blocks:
        block.fill_(3.0)
    for parameter in projection.parameters.values():
        assert bool((parameter == 3.0).all())
    assert set(projection.parameters) <= set(dict(model.named_parameters()))


def test_keys_of_one_token_per_row_are_those_of_all_tokens(make_model, mixture, ids):
    model = make_model(mixture)
    decoder = find_decoder(model)
    projections = decoder.select([1, 2])
    ids = torch.cat([ids, ids.flip(1)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    whole, _ = read_keys(decoder, projections, inputs)
    at = torch.tensor([3, 7])
    some, output = read_keys(decoder, projections, inputs, at=at, output_of=decoder.blocks[2])
    assert output.shape == (2, 64)
    for projection in projections:
        keys = whole[projection.layer]
        assert keys.shape == (2, 12, projection.key_width)
        projection.layout.check(keys.flatten(0, 1))
        picked, wanted = some[projection.layer], keys[torch.arange(2), at]
        torch.testing.assert_close(
            projection.layout.stacked(picked), projection.layout.stacked(wanted), atol=1e-4, rtol=1e-4
        )


def test_a_mixture_that_is_more_than_a_sum_is_refused(make_model, ids):
    model = make_model("qwen3_moe")
    (projection,) = find_decoder(model).select([2])
    norm = nn.LayerNorm(64)
    projection.module.register_forward_hook(lambda _module, _inputs, output: norm(output))
    with pytest.raises(ModelError, match="is not the sum of its experts' output projections"):
        check_mixture(projection, runner(model, ids))


def test_a_wrong_reading_of_the_weights_is_noticed(make_model, ids):
    model = make_model("qwen2_moe")
    (projection,) = find_decoder(model).select([2])
    with pytest.raises(ModelError, match="is not the sum"):
        check_mixture(dataclasses.replace(projection, shared_gate=None), runner(model, ids))


def test_experts_in_separate_modules_are_refused(make_model):
    model = make_model("qwen3_moe")
    model.model.layers[1].mlp.experts = nn.ModuleList([copy.deepcopy(make_model("llama").model.layers[0].mlp)] * 2)
    with pytest.raises(
        ModelError, match=r"(?s)layers\.1\.mlp\.experts is a mixture.*as in transformers 5.*projection_m"
    ):
        find_decoder(model).select([1])


def test_quantized_experts_are_refused(make_model):
    model = make_model("gpt_oss")
    experts = model.model.layers[1].mlp.experts
    experts.register_buffer("down_proj_scales", torch.ones(4))
    with pytest.raises(ModelError, match=r"(?s)down_proj_scales.*without quantization"):
        find_decoder(model).select([1])


def test_dense_layers_and_named_linear_modules_of_a_mixture(make_model):
    model = make_model("deepseek_v3")
    dense, sparse = find_decoder(model).select([0, 1])
    assert (dense.name, sparse.name) == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp")
    named = find_decoder(model, projection_module="mlp.shared_experts.down_proj").select([1])[0]
    assert named.weight.shape == (64, 48)
    assert find_decoder(model, projection_module="mlp").select([1])[0].name == "model.layers.1.mlp"
