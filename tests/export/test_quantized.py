"""Edits of quantized models: the edited projections are ordinary ones, all other tensors stay quantized."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import rlsedit_fast as rf
from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export import compare_checkpoints
from rlsedit_fast.models import find_decoder, fingerprint
from rlsedit_fast.models.quantized import DequantizedLinear

DOWN = "model.layers.1.mlp.down_proj"
SETTINGS = rf.EditConfig(layers=[1], prior={"lam": 0.1}, contexts={"prefixes": [""]}, refine=0)
IDS = torch.arange(5, 15)[None]
SKIPPED = {
    "bnb4": "llm_int8_skip_modules",
    "bnb8": "llm_int8_skip_modules",
    "torchao": "modules_to_not_convert",
    "compressed": "ignore",
}
BLOCK = 32  # rows and columns that share a scale in FP8


def settings_of(kind):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if kind == "compressed":
        pytest.importorskip("compressed_tensors")
        pytest.skip("compressed-tensors does not quantize while loading")
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


def write_compressed(model, folder):
    """Writes a model with 4-bit weights in the format of compressed-tensors."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups_of = module.weight.detach().unflatten(1, (module.weight_scale.shape[1], -1))
            module.weight_scale.data.copy_(groups_of.abs().amax(2) / 7)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder, max_shard_size="100KB")
    compressor.update_config(folder)


def write_fp8(model, folder):
    """Writes a model whose decoder has FP8 weights with a scale for each block."""
    model.save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    for name in [name for name in held if name.endswith("proj.weight")]:
        weight = held[name].float()
        blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        held[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
        held[f"{name}_scale_inv"] = scale
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=sorted(SKIPPED))
def quantized(request, make_model, tokenizer, tmp_path):
    """The folder of a quantized checkpoint, and its kind."""
    make_model("llama", torch.bfloat16).save_pretrained(tmp_path / "plain")
    if request.param == "compressed":
        write_compressed(load(tmp_path / "plain"), tmp_path / "base")
    else:
        model = load(tmp_path / "plain", quantization_config=settings_of(request.param))
        model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
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


def test_an_fp8_checkpoint_stays_fp8_except_for_the_edited_projection(make_model, tokenizer, tmp_path):
    """transformers dequantizes all weights while it loads them on a CPU."""
    base = tmp_path / "base"
    write_fp8(make_model("llama", torch.bfloat16), base)
    tokenizer.save_pretrained(base)
    editor = rf.Editor.from_pretrained(base, config=SETTINGS, dtype="bfloat16")
    editor.edit([rf.Edit("{} plays the", "Toze Lado Rekuno", "harp")])
    report = editor.save_pretrained(tmp_path / "out")
    assert report.tensors == (f"{DOWN}.weight",)
    assert any("no longer quantized" in note for note in report.notes)
    difference = compare_checkpoints(base, tmp_path / "out")
    assert difference.tensors == (f"{DOWN}.weight",)
    assert difference.lacking == (f"{DOWN}.weight_scale_inv",)
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert listed == ["lm_head", DOWN]
    again = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, editor.model(IDS).logits)
    editor.undo([1])
    editor.save_pretrained(tmp_path / "undone")
    assert not compare_checkpoints(base, tmp_path / "undone").tensors


@pytest.mark.parametrize("block", [(4, 8), None])
def test_an_fp8_module_is_dequantized_as_transformers_does(block, make_model):
    from transformers.integrations.finegrained_fp8 import FP8Linear

    model = make_model("llama", torch.bfloat16)
    model.config.quantization_config = {"quant_method": "fp8"}
    mlp, old = model.model.layers[1].mlp, model.model.layers[1].mlp.down_proj
    mlp.down_proj = FP8Linear(old.in_features, old.out_features, block_size=block)
    weight, scale = mlp.down_proj.weight, mlp.down_proj.weight_scale_inv
    weight.data, scale.data = torch.randn(weight.shape).to(weight.dtype), torch.rand(scale.shape)
    (projection,) = find_decoder(model).select([1], dequantize=True)
    for row in range(0, old.out_features, 3):
        for column in range(0, old.in_features, 5):
            part = scale if block is None else scale[row // block[0], column // block[1]]
            assert projection.weight[row, column] == (weight[row, column].float() * part).bfloat16()


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
