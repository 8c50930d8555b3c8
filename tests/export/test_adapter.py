"""Adapters reproduce the edited model, or report their error."""

import copy
import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from rlsedit_fast.errors import InputError
from rlsedit_fast.export import ModuleFactors, WeightChange, adapter, changes_between, write_adapter
from rlsedit_fast.models.projections import find_decoder

from .checkpoints import edit as change_projection
from .checkpoints import gemma3, qwen35

IDS = torch.arange(3, 39).view(3, 12)


def edit(model, ranks, scale=0.05):
    """Returns a copy with weight changes of the given rank per layer."""
    edited = copy.deepcopy(model)
    for projection in find_decoder(edited).select(list(ranks)):
        d_v, d_k = projection.weight.shape
        rank = ranks[projection.layer]
        projection.write(projection.weight + scale * torch.randn(d_v, rank) @ torch.randn(rank, d_k))
    return edited


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(base, directory):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        for kind in (UserWarning, RuntimeWarning):  # peft's own about missing or unexpected keys, among others
            warnings.simplefilter("error", kind)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), directory)


def products(directory):
    tensors = load_file(directory / "adapter_model.safetensors")
    prefix, ending = "base_model.model.", ".lora_A.weight"
    return {
        name.removeprefix(prefix).removesuffix(ending): tensors[name.replace("lora_A", "lora_B")].double()
        @ down.double()
        for name, down in tensors.items()
        if name.endswith(ending)
    }


def test_peft_loads_the_adapter_without_warnings_and_gives_the_same_logits(model, tmp_path):
    edited = edit(model, {1: 2, 2: 5})
    report = write_adapter(changes_between(model, edited), tmp_path / "new" / "folder")
    loaded = adapted(model, tmp_path / "new" / "folder")
    assert (logits(edited) - logits(model)).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded), logits(edited), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(edited), atol=1e-4, rtol=0)
    assert report.rank == 5
    json.dumps(dataclasses.asdict(report))


def test_peft_uses_every_tensor(model, tmp_path):
    peft = pytest.importorskip("peft")
    report = write_adapter(changes_between(model, edit(model, {0: 3, 3: 1})), tmp_path)
    loaded = adapted(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert peft.get_peft_model_state_dict(loaded).keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in peft.get_peft_model_state_dict(loaded).items())
    assert set(loaded.peft_config["default"].target_modules) == {module.name for module in report.modules}
    assert loaded.peft_config["default"].fan_in_fan_out == (type(model).__name__ == "GPT2LMHeadModel")


def test_base_model_is_in_the_config(model, tmp_path):
    changes = changes_between(model, edit(model, {2: 1}))
    for given, written in (("some/base", "some/base"), ("", None)):
        write_adapter(changes, tmp_path, base_model=given)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == written


def test_default_rank_is_the_rank_of_the_change(model, tmp_path):
    ranks = {0: 1, 1: 7, 3: 20}
    edited = edit(model, ranks)
    changes = changes_between(model, edited)
    report = write_adapter(changes, tmp_path)
    assert [module.needed for module in report.modules] == list(ranks.values())
    assert [module.used for module in report.modules] == list(ranks.values())
    # Only the rounding of a weight of norm ||W|| is not counted.
    for change, module in zip(changes, report.modules, strict=True):
        rounding = torch.finfo(torch.float32).eps * float(change.current.norm() / change.delta.norm())
        assert module.error < rounding


def test_truncation_is_optimal_and_its_error_is_reported(model, tmp_path):
    edited = edit(model, {1: 6, 2: 2})
    changes = changes_between(model, edited)
    report = write_adapter(changes, tmp_path, rank=3)
    found = products(tmp_path)
    assert (report.rank, [(m.needed, m.used) for m in report.modules]) == (3, [(6, 3), (2, 2)])
    for change, module in zip(changes, report.modules, strict=True):
        delta = change.delta.double()
        left = float((delta - found[module.name]).norm() / delta.norm())
        assert left == pytest.approx(module.error, rel=1e-6)
        singular = torch.linalg.svdvals(delta)
        least = float(singular[module.used :].norm() / singular.norm())
        assert module.error == pytest.approx(least, rel=1e-3, abs=1e-6)
    assert 0.1 < report.modules[0].error < 0.9
    loaded = adapted(model, tmp_path)
    name = report.modules[0].name
    inner = loaded.base_model.model.get_submodule(name)
    torch.testing.assert_close(
        inner.get_delta_weight("default").T if changes[0].transposed else inner.get_delta_weight("default"),
        found[name].float(),
        atol=1e-5,
        rtol=1e-5,
    )


def test_factors_are_balanced(model, tmp_path):
    write_adapter(changes_between(model, edit(model, {2: 4})), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (down,) = (tensor for name, tensor in tensors.items() if "lora_A" in name)
    (up,) = (tensor for name, tensor in tensors.items() if "lora_B" in name)
    assert down.dtype == up.dtype == torch.float32
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))
    torch.testing.assert_close(down @ down.T, up.T @ up, atol=1e-4, rtol=1e-4)


def test_master_weights_have_the_rank_of_the_edits_and_rounded_weights_full_rank(make_model, tmp_path):
    base = make_model("llama", torch.bfloat16)
    projection = find_decoder(base).select([1])[0]
    original = projection.weight
    master = original.float() + 0.05 * torch.randn(64, 4) @ torch.randn(4, 96)
    stored = master.bfloat16()
    exact = write_adapter([WeightChange(projection.name, original, stored, master, False)], tmp_path)
    assert exact.modules[0].needed == 4
    rounded = write_adapter([WeightChange(projection.name, original, stored, stored, False)], tmp_path)
    assert rounded.modules[0].needed == 64
    assert max(exact.modules[0].error, rounded.modules[0].error) < 1e-5


def test_rounding_of_many_updates_is_not_counted_as_rank(tmp_path):
    updates = 400
    original = torch.randn(96, 160)
    master = original.clone()
    left = torch.randn(96, 3)
    for _ in range(updates):
        master += 0.01 * left @ torch.randn(3, 160)
    change = WeightChange("m", original, master, master, False)
    assert write_adapter([change], tmp_path, updates=updates).modules[0].needed == 3
    assert write_adapter([change], tmp_path).modules[0].needed > 3


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (48, 48)])
def test_both_decompositions_agree(shape, monkeypatch):
    torch.manual_seed(0)
    original = torch.randn(shape)
    # Singular values down to the rounding of the weights.
    update = torch.randn(shape[0], 12) * 10.0 ** -torch.arange(12).mul(0.5) @ torch.randn(12, shape[1])
    change = WeightChange("m", original, original + update, original + update, False)
    taken = []

    def spied(function):
        return lambda *given, **options: (taken.append(function.__name__), function(*given, **options))[1]

    monkeypatch.setattr(torch.linalg, "eigh", spied(torch.linalg.eigh))
    monkeypatch.setattr(torch.linalg, "svd", spied(torch.linalg.svd))
    found = []
    for floor in (0.0, float("inf")):
        monkeypatch.setattr(adapter, "_GRAM_FLOOR", floor)
        found.append(adapter._factored(change, None, 1))
    assert taken == ["linalg_eigh", "linalg_svd"]
    (by_gram, *gram), (by_svd, *svd) = found
    assert by_gram.needed == by_svd.needed == 12
    assert by_gram.error == pytest.approx(by_svd.error, rel=0.05)
    torch.testing.assert_close(gram[1] @ gram[0], svd[1] @ svd[0], atol=1e-5, rtol=0)


def test_small_tolerance_uses_the_svd(monkeypatch):
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(60, 40, dtype=torch.float64))
    singular = torch.cat([torch.ones(1), torch.full((19,), 1e-10), torch.zeros(20)]).double()
    flat = left * singular @ right.T
    _, found = adapter._left_vectors(flat, 1e-11)
    assert int((found > 1e-11).sum()) == 20
    monkeypatch.setattr(adapter, "_GRAM_FLOOR", 0.0)
    _, found = adapter._left_vectors(flat, 1e-11)
    assert int((found > 1e-11).sum()) != 20, "otherwise the Gram matrix would be accurate enough"


def test_unchanged_modules_are_omitted_and_an_empty_adapter_is_rejected(model, tmp_path):
    changed = changes_between(model, edit(model, {2: 2}))[0]
    still = find_decoder(model).select([0])[0]
    unchanged = WeightChange(still.name, still.weight, still.weight, still.weight, still.transposed)
    with pytest.raises(InputError, match="none of the 1 changes is larger than rounding"):
        write_adapter([unchanged], tmp_path / "a")
    with pytest.raises(InputError, match="none of the 0 changes"):
        write_adapter([], tmp_path / "a")
    assert not (tmp_path / "a").exists()
    report = write_adapter([unchanged, changed], tmp_path / "a")
    assert report.modules[0] == ModuleFactors(still.name, 0, 0, 0.0)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"] == [changed.name]
    adapted(model, tmp_path / "a")


def test_bad_arguments_write_nothing(model, tmp_path):
    changes = changes_between(model, edit(model, {2: 2}))
    for options, message in (({"rank": 0}, "rank=0"), ({"updates": 0}, "updates=0")):
        with pytest.raises(InputError, match=message):
            write_adapter(changes, tmp_path / "a", **options)
    with pytest.raises(InputError, match="several changes"):
        write_adapter(changes * 2, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_adapter(changes, tmp_path / "file")


@pytest.mark.parametrize("make", [qwen35, gemma3])
def test_the_adapter_of_a_multimodal_model_loads_onto_the_class_of_its_checkpoint(make, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText

    make(len(tokenizer)).save_pretrained(tmp_path / "base")
    base, edited = (AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval() for _ in range(2))
    (change,) = change_projection(edited)
    assert change.name == "model.language_model.layers.1.mlp.down_proj"
    write_adapter([change], tmp_path / "adapter")
    before = logits(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert (logits(loaded) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(loaded), logits(edited), atol=1e-4, rtol=0)
