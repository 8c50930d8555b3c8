"""Sparse patches restore the edited weights in checkpoint coordinates."""

import copy

import pytest
import torch

from rlsedit_fast.errors import InputError
from rlsedit_fast.export import changes_between, patches_of, read_patch, write_patch
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.projections import find_decoder


def edit(model, fraction=0.1):
    """Returns a copy in which a fraction of the entries of two weights changed."""
    torch.manual_seed(0)
    edited = copy.deepcopy(model)
    for projection in find_decoder(edited).select([0, 2]):
        chosen = torch.rand(projection.weight.shape) < fraction
        projection.write(torch.where(chosen, projection.weight.float() + 1, projection.weight.float()))
    return edited


def applied(model, patches):
    """Returns the state dict of a model after patches, as a loader of checkpoints applies them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for patch in patches:
        assert tuple(state[patch.name].shape) == patch.full_shape
        assert patch.indices.dtype == torch.int32
        state[patch.name].view(-1)[patch.indices.long()] = patch.values
    return state


def test_patch_restores_the_edited_weights_bit_for_bit(model, tmp_path):
    edited = edit(model)
    changes = changes_between(model, edited)
    written = write_patch(changes, tmp_path / "patch.safetensors", base_fingerprint=fingerprint(model))
    patches = read_patch(tmp_path / "patch.safetensors")
    assert [patch.name for patch in patches] == [patch.name for patch in written]
    restored = applied(model, patches)
    assert all(torch.equal(tensor, restored[name]) for name, tensor in edited.state_dict().items())
    changed = sum(int((change.original != change.stored).sum()) for change in changes)
    assert sum(len(patch.indices) for patch in patches) == changed < sum(c.stored.numel() for c in changes) / 5


def test_values_have_the_dtype_of_the_model(make_model):
    model = make_model("llama", torch.bfloat16)
    patches = patches_of(changes_between(model, edit(model)))
    assert {patch.values.dtype for patch in patches} == {torch.bfloat16}


def test_nothing_is_written_without_a_change(model, tmp_path):
    with pytest.raises(InputError, match="no entry of a weight changed"):
        write_patch([], tmp_path / "patch.safetensors", base_fingerprint="0" * 64)
    assert not any(tmp_path.iterdir())


def test_damaged_file_is_refused(model, tmp_path):
    path = tmp_path / "patch.safetensors"
    write_patch(changes_between(model, edit(model)), path, base_fingerprint="0" * 64)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        read_patch(path)
    path.write_bytes(data[:100])
    with pytest.raises(InputError, match="damaged"):
        read_patch(path)
