"""Projections are found by module structure; weights are read and written in either layout."""

import copy

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


def test_square_conv1d_is_recognized_by_its_type(make_model):
    projection = find_decoder(make_model("gpt2")).projections[0]
    assert projection.weight.shape == (64, 64)
    assert projection.transposed
    assert torch.equal(projection.weight, projection.module.weight.T)


def test_write_updates_the_module(model):
    projection = find_decoder(model).projections[1]
    values = torch.randn_like(projection.weight)
    projection.write(values)
    assert torch.equal(projection.weight, values)
    stored = projection.module.weight
    assert torch.equal(stored.T if projection.transposed else stored, values)


def test_unknown_names_raise(make_model):
    model = make_model("llama")
    with pytest.raises(ModelError, match=r"model\.lairs"):
        find_decoder(model, layer_module="model.lairs")
    with pytest.raises(ModelError, match=r"mlp\.exit"):
        find_decoder(model, projection_module="mlp.exit").select([1])
    with pytest.raises(ModelError, match="RMSNorm"):
        find_decoder(model, projection_module="input_layernorm").select([1])
    with pytest.raises(ModelError, match="0 to 3"):
        find_decoder(model).select([4])


@pytest.mark.parametrize(("name", "inner"), [("llama", "mlp.up_proj"), ("gpt2", "attn.c_attn")])
def test_projection_of_wrong_width_raises(make_model, name, inner):
    with pytest.raises(ModelError, match=rf"{inner} has outputs of width \d+, but the residual stream has width 64"):
        find_decoder(make_model(name), projection_module=inner).select([1])


def test_overrides(make_model):
    found = find_decoder(make_model("llama"), layer_module="model.layers", projection_module="self_attn.o_proj")
    assert found.blocks_name == "model.layers"
    assert found.select([2])[0].name == "model.layers.2.self_attn.o_proj"


def test_last_of_several_modules_in_one_parent_is_the_projection(make_model):
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj = nn.Linear(64, 64)
    assert find_decoder(model).select([0])[0].name == "model.layers.0.mlp.down_proj"


def test_attention_is_ignored(make_model):
    model = make_model("llama")
    for block in model.model.layers:
        del block.mlp
    with pytest.raises(ModelError, match=r"(?s)layers\.0 has no MLP.*self_attn\.o_proj.*projection_module"):
        find_decoder(model).select([0])


def test_two_mlps_of_a_block_are_ambiguous(make_model):
    model = make_model("llama")
    model.model.layers[1].feed = copy.deepcopy(model.model.layers[1].mlp)
    decoder = find_decoder(model)
    expected = r"(?s)layers\.1 has several MLPs, .*mlp\.down_proj.*feed\.down_proj.*layer_module=.*projection_module="
    with pytest.raises(ModelError, match=expected):
        decoder.select([0, 1])
    assert len(decoder.select([0, 2])) == 2


def test_list_without_mlps_is_ignored(make_model):
    model = make_model("llama")
    model.model.extra = nn.ModuleList([nn.Linear(64, 32) for _ in range(4)])
    assert find_decoder(model).blocks_name == "model.layers"


def test_list_outside_the_text_decoder_is_ignored(make_model):
    model = make_model("llama")
    model.vision = copy.deepcopy(model.model.layers)
    assert find_decoder(model).blocks_name == "model.layers"


def test_two_lists_of_blocks_are_ambiguous(make_model):
    model = make_model("llama")
    model.model.twin = copy.deepcopy(model.model.layers)
    with pytest.raises(ModelError, match=r"(?s)model\.layers.*model\.twin.*layer_module"):
        find_decoder(model)
    assert find_decoder(model, layer_module="model.twin").select([1])[0].name == "model.twin.1.mlp.down_proj"


class FakeBfloat16(torch.Tensor):
    """A quantized weight that reports bfloat16 as its dtype."""


class Packed(nn.Module):
    """A quantized module of unknown type with a packed weight and `out_features`."""

    def __init__(self):
        super().__init__()
        self.out_features = 64
        self.register_buffer("qweight", torch.zeros(64, 12, dtype=torch.int32))


def with_weight(module, weight):
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return module


def with_scales(module):
    module.register_buffer("weight_scale", torch.ones(64))
    return module


UNFIT = {
    "int8": (lambda m: with_weight(m, m.weight.to(torch.int8)), "int8"),
    "uint8": (lambda m: with_weight(m, m.weight.to(torch.uint8)), "uint8"),
    "float8": (lambda m: with_weight(m, m.weight.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "subclass": (lambda m: with_weight(m, m.weight.detach().bfloat16().as_subclass(FakeBfloat16)), "FakeBfloat16"),
    "scales": (with_scales, "weight_scale"),
    "packed": (lambda m: Packed(), "Packed with qweight"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_quantized_weights_raise_only_for_their_block(make_model, kind):
    change, message = UNFIT[kind]
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj = change(model.model.layers[1].mlp.down_proj)
    decoder = find_decoder(model)
    with pytest.raises(ModelError, match=rf"model\.layers\.1\.mlp\.down_proj .*{message}.*without quantization"):
        decoder.select([0, 1])
    assert [p.layer for p in decoder.select([3, 0])] == [0, 3]


def test_weights_on_the_meta_device_raise(make_model):
    model = make_model("llama")
    model.model.layers[2].mlp.down_proj.to("meta")
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.down_proj .*device_map"):
        find_decoder(model).select([2])


def test_shared_weights_raise(make_model):
    model = make_model("llama")
    layers = model.model.layers
    layers[2].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    decoder = find_decoder(model)
    for chosen in ([1, 2], [1], [2]):
        with pytest.raises(ModelError, match="shares its weight"):
            decoder.select(chosen)
    assert len(decoder.select([0, 3])) == 2
    layers[3] = layers[0]
    with pytest.raises(ModelError, match=r"model\.layers\.3\.mlp\.down_proj shares its weight"):
        find_decoder(model).select([3])


def test_adjacent_weights_are_not_shared(make_model):
    model = make_model("llama")
    flat = torch.randn(4, 64, 96)
    for block, part in zip(model.model.layers, flat, strict=True):
        with_weight(block.mlp.down_proj, part)
    assert len(find_decoder(model).projections) == 4


def test_adapters_raise(make_model):
    peft = pytest.importorskip("peft")
    settings = {"task_type": "CAUSAL_LM", "r": 2, "layers_to_transform": [1], "layers_pattern": "layers"}
    wrapped = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["down_proj"], **settings))
    with pytest.raises(ModelError, match=r"has an adapter.*merge"):
        find_decoder(wrapped)
    wrapped = peft.get_peft_model(make_model("llama"), peft.LoraConfig(target_modules=["down_proj"], **settings))
    bare = wrapped.base_model.model
    del bare.peft_config
    for name in (None, "mlp.down_proj", "mlp.down_proj.base_layer"):
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj.*merge"):
            find_decoder(bare, projection_module=name).select([1])
    assert find_decoder(bare).select([0])[0].name == "model.layers.0.mlp.down_proj"
    assert len(find_decoder(wrapped.merge_and_unload()).projections) == 4


def test_dense_blocks_of_a_mixture(make_model):
    model, dense = make_model("mixtral"), make_model("llama")
    model.model.layers[0] = dense.model.layers[0]
    assert find_decoder(model).select([0])[0].name == "model.layers.0.mlp.down_proj"


def test_shared_expert_must_be_named(make_model):
    decoder = find_decoder(make_model("qwen2_moe"), projection_module="mlp.shared_expert.down_proj")
    assert [p.weight.shape for p in decoder.projections] == [(64, 40)] * 4


def test_module_with_two_names(make_model):
    model = make_model("llama")
    model.model.blocks = model.model.layers
    for block in model.model.layers:
        block.feed = block.mlp
    assert find_decoder(model).select([1])[0].name == "model.layers.1.mlp.down_proj"
    by_name = find_decoder(model, layer_module="model.blocks", projection_module="feed.down_proj")
    assert by_name.select([1])[0].name == "model.blocks.1.feed.down_proj"


def test_list_of_experts_is_ignored(make_model):
    model = make_model("llama")
    model.model.layers[2].mlp.experts = nn.ModuleList([nn.Linear(96, 64) for _ in range(4)])
    assert find_decoder(model).blocks_name == "model.layers"


def test_named_routed_expert_raises(make_model):
    model = make_model("llama")
    for block in model.model.layers:
        block.mlp.experts = nn.ModuleList([nn.Linear(96, 64)])
    with pytest.raises(ModelError, match=r"mlp\.experts\.0 is a routed expert"):
        find_decoder(model, projection_module="mlp.experts.0").select([0])
