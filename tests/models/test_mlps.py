"""Distinguishes the MLP of a block from attention, state space models and side paths, or refuses it with the reason."""

import pytest
import torch
from torch import nn

import rlsedit_fast as rf
from rlsedit_fast.errors import ModelError
from rlsedit_fast.models.mlps import candidates, choose_mlps, find_mlps
from rlsedit_fast.models.projections import find_decoder

from ..tiny_families import MULTIMODAL, TEXT, TEXT_FAMILIES, make

VOCABULARY = 50


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_the_output_projection_of_the_mlp_is_found(name):
    _, _, projection, count = TEXT_FAMILIES[name]
    decoder = find_decoder(make(name, VOCABULARY))
    found = {
        one.layer: one.name.removeprefix(f"{decoder.blocks_name}.{one.layer}.")
        for one in decoder.locate(decoder.editable)
    }
    assert list(found.values()).count(projection) == count
    assert all(one in (projection, projection.partition(".")[0]) for one in found.values())  # the latter is a mixture


@pytest.mark.parametrize("name", MULTIMODAL)
def test_the_text_half_of_a_multimodal_model_is_found(name):
    decoder = find_decoder(make(name, VOCABULARY))
    assert "language_model" in decoder.blocks_name
    assert decoder.locate([0])[0].name.endswith("down_proj")


def test_blocks_without_an_mlp_are_not_edited(tokenizer):
    model = make("nemotron_h", len(tokenizer))
    decoder = find_decoder(model)
    assert decoder.editable == [1, 3, 5]
    for layer in (0, 2):  # a state space model, attention
        with pytest.raises(ModelError, match=rf"layers\.{layer} has no MLP.*(?s:.*)use a layer that has one: 1, 3, 5"):
            decoder.select([layer])
    editor = rf.Editor(model, tokenizer)
    assert [one.name for one in editor.context.projections] == ["model.layers.1.mixer.down_proj"]
    named = find_decoder(model, projection_module="mixer.o_proj")
    assert named.editable == [2]
    assert named.select([2])[0].name == "model.layers.2.mixer.o_proj"


def test_layers_are_chosen_by_depth_among_those_with_an_mlp(tokenizer):
    kinds = ["mamba", "mlp"] * 16
    model = make("nemotron_h", len(tokenizer), layers_block_type=kinds, num_hidden_layers=32)
    layers = rf.Editor(model, tokenizer).layers
    assert layers == tuple(2 * layer + 1 for layer in rf.EditConfig().layers_for(16))


def test_ordinary_mlps_are_preferred_to_mixtures(tokenizer):
    assert rf.Editor(make("jamba", len(tokenizer)), tokenizer).layers == (0,)


def test_models_without_any_mlp_are_refused(tokenizer):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8}
    model = Mamba2ForCausalLM(Mamba2Config(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes))
    with pytest.raises(ModelError, match=r"layers\.0 has no MLP.*mixer\.out_proj"):
        rf.Editor(model, tokenizer)


def longcat():
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "q_lora_rank": 8}
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
    experts = {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 16}
    return LongcatFlashForCausalLM(LongcatFlashConfig(vocab_size=VOCABULARY, **sizes, **latent, **experts))


def latent_experts():
    mixture = {"layers_block_type": ["mamba", "moe"], "num_hidden_layers": 2, "n_routed_experts": 4}
    sizes = {"moe_latent_size": 16, "moe_intermediate_size": 24, "moe_shared_expert_intermediate_size": 24}
    routing = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    return make("nemotron_h", VOCABULARY, **mixture, **sizes, **routing)


def normalized_experts():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCABULARY, **TEXT, **experts))
    for block in model.model.layers:
        block.mlp.experts.post_expert_norm = nn.RMSNorm(32)
    return model


REFUSED = {
    "two MLPs": (longcat, 0, r"layers\.0 has several MLPs, .*mlps\.0\.down_proj, .*mlps\.1\.down_proj"),
    "latent experts": (latent_experts, 1, r"layers\.1\.mixer .*latent space of width 16.*fc2_latent_proj"),
    "norms": (normalized_experts, 1, r"layers\.1\.mlp .*the norm .*post_expert_norm behind its experts"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_one_linear_map_is_refused_with_the_reason(kind):
    build, layer, message = REFUSED[kind]
    with pytest.raises(ModelError, match=message):
        find_decoder(build()).select([layer])


class Up(nn.Module):
    """An MLP with its activation as a function."""

    def __init__(self, inner, outer=32, act=torch.relu):
        super().__init__()
        self.first, self.last, self.act = nn.Linear(32, inner), nn.Linear(inner, outer), act


class Mixer(Up):
    """Linear modules of the shapes of an MLP, in a module that reads other tokens."""

    def forward(self, hidden, attention_mask=None):
        return hidden


class ScaleNorm(Up):
    """A norm whose scale is an MLP."""


def block_of(**parts):
    block = nn.Module()
    for name, part in parts.items():
        block.add_module(name, part)
    return block


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (block_of(mixer=Mixer(128), mlp=Up(64)), ["mlp.last"]),
        (block_of(conv=Up(128), mlp=Up(64)), ["conv.last"]),
        (block_of(norm=ScaleNorm(128), mlp=Up(64)), ["mlp.last"]),
        (block_of(low_rank=Up(16, act=None), mlp=Up(16)), ["mlp.last"]),  # without an activation
        (block_of(side=Up(16), mlp=Up(64)), ["mlp.last"]),
        (block_of(gate=nn.Linear(32, 64), act=nn.ReLU(), out=nn.Linear(64, 32), mlp=Up(64)), ["mlp.last"]),
        (block_of(fc1=nn.Linear(32, 64), act=nn.ReLU(), fc2=nn.Linear(64, 32)), ["fc2"]),
        (block_of(first=block_of(dense=nn.Linear(32, 64)), second=block_of(dense=nn.Linear(64, 32))), ["second.dense"]),
        (block_of(one=Up(64), two=Up(64)), ["one.last", "two.last"]),
        (block_of(alone=nn.Linear(64, 32)), []),
    ],
    ids=["mixer", "wider", "norm", "linear path", "narrow", "own parts", "flat", "apart", "two", "no input"],
)
def test_choice_among_linear_modules(block, expected):
    assert [one.projection for one in choose_mlps(find_mlps(block, 32))] == expected


def test_a_module_with_a_convolution_mixes_tokens():
    mixer = Up(128)
    assert candidates(block_of(part=mixer), 32) == ["part.last"]
    mixer.conv1d = nn.Conv1d(32, 32, 3)
    assert candidates(block_of(part=mixer), 32) == []
    mixer.conv1d = nn.Conv1d(32, 32, 1)  # of each token by itself
    assert candidates(block_of(part=mixer), 32) == ["part.last"]


def test_experts_beside_a_dense_mlp_leave_the_mlp():
    model = make("granite4_experts", VOCABULARY)
    assert model.model.layers[0].block_sparse_moe is not None
    assert find_decoder(model).select([0])[0].name == "model.layers.0.shared_mlp.output_linear"
    mixture = find_decoder(model, projection_module="block_sparse_moe").select([0])[0]
    assert mixture.layout is not None
