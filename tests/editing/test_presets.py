"""A preset is found by the architecture and shape of the model, and has the published settings."""

import pytest
import torch
from transformers import GPT2Config, GPTJConfig, LlamaConfig, MistralConfig, Qwen2Config

import rlsedit_fast as rf
from rlsedit_fast.editing.config import EditConfig
from rlsedit_fast.editing.presets import PRESETS, find_preset
from rlsedit_fast.editing.priors import choose_priors
from rlsedit_fast.errors import InputError, PriorError


def like_llama(kind, layers, hidden, inner, **more):
    return kind(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=inner, num_attention_heads=8, **more)


GPT2_XL = GPT2Config(n_layer=48, n_embd=1600, n_head=25)

# Published: layers, rate, steps, moment weight.
TABLE = {
    "gpt2-xl": (GPT2_XL, (13, 14, 15, 16, 17), 0.5, 20, 20_000),
    "gpt-j-6b": (GPTJConfig(n_layer=28, n_embd=4096, n_head=16), (3, 4, 5, 6, 7, 8), 0.5, 25, 15_000),
    "llama-2-7b": (like_llama(LlamaConfig, 32, 4096, 11008), (4, 5, 6, 7, 8), 0.1, 25, 15_000),
    "llama-3-8b": (like_llama(LlamaConfig, 32, 4096, 14336), (4, 5, 6, 7, 8), 0.1, 25, 15_000),
    "llama-3.2-3b": (like_llama(LlamaConfig, 28, 3072, 8192), (2, 3, 4, 5, 6), 0.1, 25, 15_000),
    "qwen2.5-7b": (like_llama(Qwen2Config, 28, 3584, 18944), (7, 8, 9, 10, 11), 0.1, 25, 15_000),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_published_model_gets_its_published_settings(name):
    model_config, layers, rate, steps, moment_weight = TABLE[name]
    found = find_preset(model_config)
    assert found is PRESETS[name]
    config = EditConfig(**found.settings())
    assert config == EditConfig.from_preset(name)
    assert config.layers == layers
    assert max(layers) < model_config.num_hidden_layers
    assert (config.search.optimizer, config.search.learning_rate, config.search.steps) == ("adam", rate, steps)
    assert (config.search.stop, config.search.stop_loss) == ("loss", 0.05)
    assert config.prior.mu**2 == pytest.approx(moment_weight)
    assert (config.prior.lam, config.search.clamp, config.search.loss.kl_factor, config.search.loss.weight_decay) == (
        0.0,
        0.75,
        0.0625,
        0.5,
    )
    assert config.same_subject == "separate"
    assert (config.contexts.rows, config.refine) == ("mean", 0)
    assert (config.search.kl_prompts, config.batch_size) == (("{} is a",), 100)


def test_the_table_is_complete():
    assert set(TABLE) == set(PRESETS)


@pytest.mark.parametrize(
    "other",
    [
        GPT2Config(n_layer=24, n_embd=1024, n_head=16, name_or_path="openai-community/gpt2-xl"),
        GPT2Config(n_layer=48, n_embd=1600, n_head=25, n_inner=1600, name_or_path="gpt2-xl"),
        like_llama(LlamaConfig, 32, 4096, 8192, name_or_path="meta-llama/Llama-2-7b-hf"),
        like_llama(LlamaConfig, 28, 3584, 18944),
        like_llama(MistralConfig, 32, 4096, 14336),
        like_llama(Qwen2Config, 28, 2048, 18944),
    ],
)
def test_a_model_that_matches_only_in_name_or_shape_has_no_preset(other):
    assert find_preset(other) is None


def test_the_text_configuration_of_a_composite_model_is_used():
    class Composite:
        def get_text_config(self):
            return GPT2_XL

    assert find_preset(Composite()) is PRESETS["gpt2-xl"]


def test_settings_of_a_preset_can_be_changed_and_unknown_names_raise():
    config = EditConfig.from_preset("llama-3-8b", prior={"lam": 0.5}, batch_size=10)
    assert (config.prior.lam, config.batch_size, config.search.optimizer) == (0.5, 10, "adam")
    assert EditConfig.from_preset("llama-3-8b", prior={"lam": 0.5}, batch_size=10) == config
    with pytest.raises(
        InputError, match=r"unknown preset 'llama': expected one of gpt2-xl, .*, generic; did you mean 'llama-3-8b'"
    ):
        EditConfig.from_preset("llama")
    with pytest.raises(InputError, match="unknown setting 'layer'; did you mean layers"):
        EditConfig.from_preset("generic", layer=(1,))
    with pytest.raises(InputError, match="batch_size=0"):
        EditConfig.from_preset("gpt2-xl", batch_size=0)


def test_generic_layers_depend_on_the_depth():
    generic = EditConfig.from_preset("generic", batch_size=7)
    assert generic == rf.EditConfig(batch_size=7)
    assert generic.layers_for(32) == (2, 3, 4, 5, 6, 7, 8)
    assert generic.layers_for(80) == tuple(range(10, 21))


def test_lam_0_requires_an_anchor_moment_of_full_rank():
    torch.manual_seed(0)
    keys, weight = torch.randn(3, 8), torch.randn(4, 8)
    rows = torch.randn(50, 8)
    config = EditConfig.from_preset("gpt2-xl")
    (prior,) = choose_priors(config, [rows.T @ rows / 50], [None], None)
    assert (prior.lam, prior.mu**2) == (0.0, pytest.approx(20_000))
    state = rf.RLSState(weight, prior)
    assert state.update(keys, keys @ weight.T + 1).realized.isfinite().all()
    few = torch.randn(5, 8)
    (short,) = choose_priors(config, [few.T @ few / 5], [None], None)
    with pytest.raises(PriorError, match="increase lam above 0 or pass more anchors"):
        rf.RLSState(weight, short)
