"""The class that holds the whole model is chosen by the config."""

import pytest
import transformers

from rlsedit_fast.errors import ModelError
from rlsedit_fast.models import classes
from rlsedit_fast.models.classes import whole_model_class


def config_of(kind, *architectures, **settings):
    return getattr(transformers, f"{kind}Config")(architectures=list(architectures) or None, **settings)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (config_of("Llama", "LlamaForCausalLM"), "AutoModelForCausalLM"),
        (config_of("Llama"), "AutoModelForCausalLM"),
        (config_of("Llama", "LlamaModel"), "AutoModelForCausalLM"),
        (config_of("Llama", "AnotherNameForCausalLM"), "AutoModelForCausalLM"),
        (config_of("Qwen2_5_VL", "Qwen2_5_VLForConditionalGeneration"), "AutoModelForImageTextToText"),
        (config_of("Qwen2_5_VL"), "AutoModelForImageTextToText"),
        (config_of("Llama4", "Llama4ForConditionalGeneration"), "AutoModelForImageTextToText"),
        (config_of("Llama4Text", "Llama4ForCausalLM"), "AutoModelForCausalLM"),
    ],
)
def test_class_that_holds_all_parts(config, expected):
    assert whole_model_class(config).__name__ == expected


def test_a_class_outside_of_auto_classes_is_taken_by_name(monkeypatch):
    found = whole_model_class(config_of("Idefics", "IdeficsForVisionText2Text"))
    assert found.__name__ == "AutoModelForImageTextToText"
    monkeypatch.setattr(classes, "_AUTO_CLASSES", ("AutoModelForCausalLM",))
    assert (
        whole_model_class(config_of("Idefics", "IdeficsForVisionText2Text")) is transformers.IdeficsForVisionText2Text
    )


@pytest.mark.parametrize(
    ("registered", "architecture", "expected"),
    [
        ({"AutoModelForCausalLM": "modeling.MyLM"}, "MyLM", "AutoModelForCausalLM"),
        ({"AutoModelForCausalLM": "other--modeling.MyLM"}, "MyLM", "AutoModelForCausalLM"),
        ({"AutoModel": "modeling.MyChat"}, "MyChat", "AutoModel"),
        ({"AutoModel": "m.MyBase", "AutoModelForImageTextToText": "m.MyVLM"}, "MyVLM", "AutoModelForImageTextToText"),
        (
            {"AutoModelForCausalLM": "m.MyLM", "AutoModelForImageTextToText": "m.MyVLM"},
            "MyVLM",
            "AutoModelForImageTextToText",
        ),
    ],
)
def test_code_of_the_checkpoint(registered, architecture, expected):
    config = config_of("Llama", architecture)
    config.auto_map = registered
    assert whole_model_class(config, trust_remote_code=True).__name__ == expected
    assert whole_model_class(config).__name__ == "AutoModelForCausalLM"  # of transformers


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match="LlamaForSequenceClassification, which does not generate text"):
        whole_model_class(config_of("Llama", "LlamaForSequenceClassification"))
    with pytest.raises(ModelError, match=r"no class of a language model for ViTModel \(model type 'vit'\)"):
        whole_model_class(config_of("ViT", "ViTModel"))
    config = config_of("ViT", "ViTLanguage")
    config.auto_map = {"AutoModelForCausalLM": "modeling.ViTLanguage"}
    with pytest.raises(ModelError, match=r"code of its own(?s:.*)--trust-remote-code"):
        whole_model_class(config)
