"""Projections of every supported architecture are found and edited, in float32 and bfloat16."""

import pytest
import torch

from rlsedit_fast.models.projections import find_decoder

PROJECTIONS = {
    "gpt2": "transformer.h.1.mlp.c_proj",
    "gptj": "transformer.h.1.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.1.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.1.fc2",
    "falcon": "transformer.h.1.mlp.dense_4h_to_h",
    "falcon_new": "transformer.h.1.mlp.dense_4h_to_h",
}
DEFAULT_PROJECTION = "model.layers.1.mlp.down_proj"


@pytest.fixture
def ids(tokenizer):
    return torch.randint(4, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(0))


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_is_found_and_its_weight_matters(make_model, family, dtype, ids):
    model = make_model(family, dtype)
    (projection,) = find_decoder(model).select([1])
    assert projection.name == PROJECTIONS.get(family, DEFAULT_PROJECTION)
    before = logits_of(model, ids)
    kept = projection.weight.clone()
    projection.write(torch.zeros_like(kept))
    after = logits_of(model, ids)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    projection.write(kept)
    assert torch.equal(logits_of(model, ids), before)


def test_a_written_weight_is_saved_and_loaded(make_model, family, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_model(family)
    (projection,) = find_decoder(model).select([1])
    projection.write(projection.weight * 1.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(find_decoder(loaded).select([1])[0].weight, projection.weight)
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(model, ids))


def test_the_text_decoder_of_a_vision_model_is_found(tokenizer):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **sizes),
        image_token_index=5,
    )
    model = LlavaForConditionalGeneration(config)
    (projection,) = find_decoder(model).select([1])
    assert projection.module is model.get_decoder().layers[1].mlp.down_proj
