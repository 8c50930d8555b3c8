"""Models are recognised by their modules, and weights are read and written whichever way they are stored."""

import pytest
import torch
from torch import nn

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.projections import find_decoder


def test_projection_maps_keys_to_the_residual_stream(model, tokenizer):
    decoder = find_decoder(model)
    assert len(decoder.projections) == 4
    for projection in decoder.projections:
        keys = torch.randn(5, projection.weight.shape[1])
        bias = projection.module.bias
        expected = projection.module(keys) - (0 if bias is None else bias)
        torch.testing.assert_close(keys @ projection.weight.T, expected)


def test_square_conv1d_is_told_by_its_type(make_model):
    projection = find_decoder(make_model("gpt2")).projections[0]
    assert projection.weight.shape == (64, 64)
    assert projection.transposed
    assert torch.equal(projection.weight, projection.module.weight.T)


def test_written_weight_is_the_modules(model):
    projection = find_decoder(model).projections[1]
    wanted = torch.randn_like(projection.weight)
    projection.write(wanted)
    assert torch.equal(projection.weight, wanted)
    stored = projection.module.weight
    assert torch.equal(stored.T if projection.transposed else stored, wanted)


def test_unknown_names_are_refused_with_what_was_given(make_model):
    model = make_model("llama")
    with pytest.raises(ModelError, match=r"model\.lairs"):
        find_decoder(model, layer_module="model.lairs")
    with pytest.raises(ModelError, match=r"mlp\.exit"):
        find_decoder(model, projection_module="mlp.exit")
    with pytest.raises(ModelError, match="RMSNorm"):
        find_decoder(model, projection_module="input_layernorm")
    with pytest.raises(ModelError, match="0 to 3"):
        find_decoder(model).select([4])


def test_overrides_name_the_parts(make_model):
    found = find_decoder(make_model("llama"), layer_module="model.layers", projection_module="self_attn.o_proj")
    assert found.projections[2].name == "model.layers.2.self_attn.o_proj"


def test_block_without_an_mlp_lists_the_candidates(make_model):
    model = make_model("llama")
    for block in model.model.layers:
        block.feed = block.mlp
        del block.mlp
    with pytest.raises(ModelError, match=r"feed\.down_proj"):
        find_decoder(model)


def test_two_lists_of_blocks_are_ambiguous(make_model):
    model = make_model("llama")
    model.extra = nn.ModuleList([nn.Identity() for _ in range(4)])
    with pytest.raises(ModelError, match="layer_module"):
        find_decoder(model)


def test_integer_weights_are_refused(make_model):
    model = make_model("llama")
    projection = model.model.layers[0].mlp.down_proj
    projection.weight = nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="int8"):
        find_decoder(model)
