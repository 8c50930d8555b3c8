"""Edits of quantized models: the edited projections are ordinary ones, all other tensors stay quantized."""

import json

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export import compare_checkpoints
from rlsedit_fast.models import find_decoder, fingerprint
from rlsedit_fast.models.quantized import DequantizedLinear

DOWN = "model.layers.1.mlp.down_proj"
SETTINGS = rf.EditConfig(layers=[1], prior={"lam": 0.1}, contexts={"prefixes": [""]}, refine=0)
IDS = torch.arange(5, 15)[None]
SKIPPED = {"bnb4": "llm_int8_skip_modules", "bnb8": "llm_int8_skip_modules", "torchao": "modules_to_not_convert"}


def settings_of(kind):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, **double) if kind == "bnb4" else BitsAndBytesConfig(load_in_8bit=True)


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


@pytest.fixture(params=sorted(SKIPPED))
def quantized(request, make_model, tokenizer, tmp_path):
    """The folder of a quantized checkpoint, and its kind."""
    settings = settings_of(request.param)
    make_model("llama", torch.bfloat16).save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", quantization_config=settings).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    for name in ("plain", "base"):
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "base", request.param


def test_only_the_edited_projection_is_dequantized_and_written(quantized, tokenizer, tmp_path):
    base, kind = quantized
    model = load(base)
    before = fingerprint(model)
    with torch.no_grad():
        logits = model(IDS).logits
    editor = rf.Editor(model, tokenizer, config=SETTINGS)
    assert editor.fingerprint() == before  # a store is opened with the quantized model again
    with torch.no_grad():
        assert (model(IDS).logits - logits).abs().max() <= 0.05 * logits.abs().max()
    ordinary = [name for name, one in model.named_modules() if isinstance(one, DequantizedLinear)]
    assert ordinary == [DOWN]
    editor.edit([rf.Edit("{} plays the", "Toze Lado Rekuno", "harp")])
    report = editor.save_pretrained(tmp_path / "out")
    assert report.tensors == (f"{DOWN}.weight",)
    assert any("no longer quantized" in note for note in report.notes)
    difference = compare_checkpoints(base, tmp_path / "out")
    assert {*difference.tensors, *difference.added} == {f"{DOWN}.weight"}
    assert all(name.startswith(f"{DOWN}.") for name in difference.lacking)
    assert set(difference.files) <= {"config.json", "model.safetensors.index.json"}
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][SKIPPED[kind]]
    assert listed == ["lm_head", DOWN]
    again = load(tmp_path / "out")
    assert torch.equal(again.get_submodule(DOWN).weight, model.get_submodule(DOWN).weight)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    editor.undo([1])
    editor.save_pretrained(tmp_path / "undone")
    assert not compare_checkpoints(base, tmp_path / "undone").tensors


def test_a_model_quantized_while_loading_is_written_only_as_an_adapter(quantized, tokenizer, tmp_path):
    model = load(tmp_path / "plain", quantization_config=settings_of(quantized[1]))
    editor = rf.Editor(model, tokenizer, config=SETTINGS)
    editor.edit([rf.Edit("{} plays the", "Toze Lado Rekuno", "harp")])
    with pytest.raises(InputError, match=r"(?s)quantized while it was loaded.*--adapter"):
        editor.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert editor.save_adapter(tmp_path / "adapter").modules[0].name == DOWN


class OtherLinear(torch.nn.Module):
    """A quantized module of a kind that is not known."""

    def __init__(self, old):
        super().__init__()
        self.in_features, self.out_features = old.in_features, old.out_features
        self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_other_methods_are_refused_by_name(method, make_model):
    model = make_model("llama", torch.bfloat16)
    model.config.quantization_config = {"quant_method": method}
    mlp = model.model.layers[1].mlp
    mlp.down_proj = OtherLinear(mlp.down_proj)
    with pytest.raises(ModelError, match=f"(?s){DOWN} is a OtherLinear, quantized with {method}.*without quantization"):
        find_decoder(model).select([1], dequantize=True)
