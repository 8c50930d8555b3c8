"""Delta files restore the edited weights bit for bit, and only on their base model."""

import copy
import dataclasses
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlsedit_fast.errors import InputError, ModelError
from rlsedit_fast.export import WeightChange, apply_delta, changes_between, write_delta
from rlsedit_fast.export.changes import same_bits
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.ops import split

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def edit(model, layers=(1, 3), scale=0.05):
    edited = copy.deepcopy(model)
    for projection in find_decoder(edited).select(layers):
        d_v, d_k = projection.weight.shape
        change = torch.randn(d_v, 3) @ torch.randn(3, d_k) * scale
        projection.write(projection.weight.float() + change)
    return edited


def write(base, edited, path, **options):
    return write_delta(changes_between(base, edited), path, base_fingerprint=fingerprint(base), **options)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def assert_untouched(model, before):
    assert all(same_bits(tensor, before[name]) for name, tensor in model.named_parameters())


def awkward(dtype):
    """Returns two weights with all pairs of numbers whose differences are hard to represent."""
    limits = torch.finfo(dtype)
    least = limits.tiny * limits.eps
    sizes = [0.0, least, 3 * least, limits.tiny, 1e-4, 0.3, 1.0, 1 + limits.eps, 1 - limits.eps, 7.1]
    sizes += [2.0**20 if limits.max > 1e6 else 2.0**12, limits.max]
    numbers = torch.tensor([sign * size for size in sizes for sign in (1, -1)], dtype=torch.float64).to(dtype)
    return numbers[:, None].expand(24, 24).contiguous(), numbers[None].expand(24, 24).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("scale", [1e-4, 0.05, 30.0])
def test_round_trip_is_exact(name, dtype, scale, make_model, tmp_path):
    base = make_model(name, dtype)
    edited = edit(base, scale=scale)
    written = write(base, edited, tmp_path / "d.safetensors", edits=6)
    applied = apply_delta(base, tmp_path / "d.safetensors")
    assert_untouched(base, weights(edited))
    assert fingerprint(base) == fingerprint(edited)
    assert applied == written
    assert written.edits == 6
    assert [module.name for module in written.modules] == [p.name for p in find_decoder(base).select([1, 3])]
    json.dumps(dataclasses.asdict(written))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_round_trip_is_exact_for_awkward_pairs_of_numbers(name, dtype, make_model, tmp_path):
    base = make_model(name, dtype)
    edited = copy.deepcopy(base)
    for model, numbers in zip((base, edited), awkward(dtype), strict=True):
        find_decoder(model).select([2])[0].weight[:24, 11:35] = numbers
    assert bool((find_decoder(base).select([2])[0].weight == 0).any())
    (module,) = write(base, edited, tmp_path / "d").modules
    assert 0 < module.by_value < module.changed == 24 * 23
    assert bool(load_file(tmp_path / "d")[f"{module.name}.delta"].isfinite().all())
    apply_delta(base, tmp_path / "d")
    assert_untouched(base, weights(edited))


def test_ordinary_edits_need_few_values(make_model, tmp_path):
    # In float32 some entries that became smaller in several batches are stored by value.
    for dtype, most in ((torch.bfloat16, 0), (torch.float16, 0), (torch.float32, 0.05)):
        edited = base = make_model("llama", dtype)
        for projection in find_decoder(base).projections:
            projection.weight[0] = -0.0
        for _ in range(10):
            edited = edit(edited, scale=0.003)
        for projection in find_decoder(edited).projections:
            projection.weight[0, ::2] = -0.0  # unchanged
        for module in write(base, edited, tmp_path / "d").modules:
            assert module.by_value <= most * module.changed
            assert module.changed > 4000


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_is_exact_except_for_entries_stored_by_value(dtype, make_model, tmp_path):
    base = make_model("llama", dtype)
    edited = edit(base)
    report = write(base, edited, tmp_path / "d")
    saved = load_file(tmp_path / "d")
    for module in report.modules:
        delta, index = saved[f"{module.name}.delta"], saved.get(f"{module.name}.index", torch.zeros(0))
        assert delta.dtype == torch.float32
        summed = (base.get_parameter(f"{module.name}.weight").float() + delta).to(dtype)
        assert int((summed != edited.get_parameter(f"{module.name}.weight")).sum()) == len(index) == module.by_value


def test_rounded_master_weights_are_restored_as_stored(make_model, tmp_path):
    # Split master weights round ties up, a cast rounds them to even.
    base = make_model("llama", torch.bfloat16)
    projection = find_decoder(base).select([1])[0]
    original = projection.weight.clone()
    master = original.float() * (1 + 2**-8) + 0.01 * torch.randn_like(original, dtype=torch.float32)
    master[0] = (original[0].view(torch.int16).int() << 16 | 0x8000).view(torch.float32)
    high, _ = split(master)
    assert not torch.equal(high, master.bfloat16())
    change = WeightChange(projection.name, original, high, master, False)
    write_delta([change], tmp_path / "d", base_fingerprint=fingerprint(base))
    apply_delta(base, tmp_path / "d")
    assert same_bits(projection.weight, high)


def test_metadata_of_the_file(make_model, tmp_path):
    base = make_model("llama", torch.bfloat16)
    write(base, edit(base), tmp_path / "d", edits=12)
    with safe_open(tmp_path / "d", framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["about"])
    assert metadata["kind"].startswith("rlsedit-fast delta ")
    assert (about["base_fingerprint"], about["dtype"], about["edits"]) == (fingerprint(base), "bfloat16", 12)
    assert about["version"]
    assert list(json.loads(metadata["sums"])) == [p.name for p in find_decoder(base).select([1, 3])]


def test_wrong_base_is_rejected_and_not_modified(make_model, tmp_path):
    base = make_model("llama")
    right = fingerprint(base)
    edited = edit(base)
    write(base, edited, tmp_path / "d")
    other = copy.deepcopy(base)
    other.model.norm.weight.data[3] += 1
    for model in (other, edited, make_model("gpt2"), make_model("llama", torch.bfloat16)):
        before, found = weights(model), fingerprint(model)
        with pytest.raises(InputError, match=f"{right[:12]}.*{found[:12]}"):
            apply_delta(model, tmp_path / "d")
        assert_untouched(model, before)


def damage(path, change):
    """Rewrites a file with modified tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


def of(ending):
    return lambda tensors: next(name for name in sorted(tensors, reverse=True) if name.endswith(ending))


def nudge(tensors, _metadata):
    tensors[of("delta")(tensors)][-1, -1] += 1


def lose(tensors, _metadata):
    del tensors[of("delta")(tensors)]


def lose_values(tensors, _metadata):
    del tensors[of("value")(tensors)]


def shrink(tensors, _metadata):
    tensors[of("delta")(tensors)] = torch.zeros(2, 2)


def outside(tensors, _metadata):
    tensors[of("index")(tensors)][0] = 1 << 40


def below(tensors, _metadata):
    tensors[of("index")(tensors)][0] = -1


def truncate_metadata(_tensors, metadata):
    metadata["about"] = metadata["about"][:-1]


def other_dtype(_tensors, metadata):
    metadata["about"] = metadata["about"].replace("float32", "float31")


DAMAGES = [nudge, lose, lose_values, shrink, outside, below, truncate_metadata, other_dtype]


@pytest.mark.parametrize("change", DAMAGES, ids=lambda change: change.__name__)
def test_damaged_contents_are_rejected_by_name(change, make_model, tmp_path):
    base = make_model("llama")
    edited = edit(base)
    for projection in find_decoder(edited).select([1, 3]):
        projection.weight[4, :3] = 1e-30
    write(base, edited, tmp_path / "some-delta")
    damage(tmp_path / "some-delta", change)
    before = weights(base)
    with pytest.raises(InputError, match=r"some-delta.* is damaged"):
        apply_delta(base, tmp_path / "some-delta")
    assert_untouched(base, before)


def test_damaged_files_are_rejected_by_name(make_model, tmp_path):
    base = make_model("llama")
    write(base, edit(base), tmp_path / "some-delta")
    before, whole = weights(base), (tmp_path / "some-delta").read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    flipped = bytearray(whole)
    flipped[start + (len(whole) - start) // 8 * 4 + 3] ^= 0x40  # an exponent
    for saved in (whole[:-5], whole[:100], whole[:3], b"", bytes(flipped)):
        (tmp_path / "some-delta").write_bytes(saved)
        with pytest.raises(InputError, match=r"some-delta.* is damaged"):
            apply_delta(base, tmp_path / "some-delta")
    with pytest.raises(InputError, match=r"missing-delta.* does not exist"):
        apply_delta(base, tmp_path / "missing-delta")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(InputError, match=r"other.* expected a file of kind 'rlsedit-fast delta 1'"):
        apply_delta(base, tmp_path / "other")
    assert_untouched(base, before)


def test_missing_module_is_rejected_and_the_model_not_modified(make_model, tmp_path):
    base = make_model("llama")
    good, other = changes_between(base, edit(base))
    write_delta(
        [good, dataclasses.replace(other, name="model.layers.9.mlp.down_proj")],
        tmp_path / "d",
        base_fingerprint=fingerprint(base),
    )
    before = weights(base)
    with pytest.raises(ModelError, match=r"model\.layers\.9"):
        apply_delta(base, tmp_path / "d")
    assert_untouched(base, before)


def test_nothing_is_written_for_bad_changes(make_model, tmp_path):
    base = make_model("llama")
    changes = changes_between(base, edit(base))
    double = [tensor.double() for tensor in (changes[0].original, changes[0].stored, changes[0].current)]
    half = [tensor.half() for tensor in (changes[0].original, changes[0].stored, changes[0].stored)]
    for bad, message in (
        ([], "there are no changes to write"),
        ([*changes, changes[0]], rf"several changes of {changes[0].name}"),
        ([WeightChange("m", *double, False)], "the weights are torch.float64"),
        ([WeightChange("m", *half, False), changes[0]], r"torch\.float16, torch\.float32"),
    ):
        with pytest.raises(InputError, match=message):
            write_delta(bad, tmp_path / "d", base_fingerprint="f")
    with pytest.raises(InputError, match="base_fingerprint is empty"):
        write_delta(changes, tmp_path / "d", base_fingerprint="")
    assert list(tmp_path.iterdir()) == []


def test_file_is_replaced_atomically(make_model, tmp_path, monkeypatch):
    base = make_model("llama")
    write(base, edit(base), tmp_path / "d")
    before = (tmp_path / "d").read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match="No space left"):
            write(base, edit(base), tmp_path / "d")
    assert (tmp_path / "d").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    with pytest.raises(InputError, match="cannot be written"):
        write(base, edit(base), tmp_path / "d" / "below-a-file")
