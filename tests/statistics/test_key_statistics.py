"""Key statistics are saved completely, and damaged or other files raise an error that names the file."""

import pytest
import torch
from safetensors.torch import save_file

from rlsedit_fast.errors import InputError
from rlsedit_fast.statistics import KeyStatistics
from rlsedit_fast.statistics.key_statistics import EARLIER_STATISTICS, write_matrices


@pytest.fixture
def statistics():
    torch.manual_seed(0)
    moments = {layer: torch.randn(6, 6) for layer in (4, 11)}
    held_out = {layer: torch.randn(6, 6) for layer in moments}
    return KeyStatistics(moments, 1234, "ab" * 32, "text.txt, sha256 00", held_out, 137)


def test_loaded_statistics_equal_the_saved_ones(statistics, tmp_path):
    path = tmp_path / "folder" / "s.safetensors"
    statistics.save(path)
    loaded = KeyStatistics.load(path)
    assert (loaded.tokens, loaded.fingerprint, loaded.source) == (
        statistics.tokens,
        statistics.fingerprint,
        statistics.source,
    )
    assert list(loaded.moments) == list(loaded.held_out) == [4, 11]
    assert loaded.held_out_tokens == 137
    assert all(torch.equal(loaded.held_out[layer], statistics.held_out[layer]) for layer in statistics.held_out)
    assert all(torch.equal(loaded.moments[layer], statistics.moments[layer]) for layer in statistics.moments)
    some = KeyStatistics.load(path, layers=[11])
    assert list(some.moments) == list(some.held_out) == [11]
    with pytest.raises(InputError, match="layers 4, 11 and lacks 5"):
        KeyStatistics.load(path, layers=[4, 5])


def test_a_file_of_the_version_without_held_out_tokens_is_read(statistics, tmp_path):
    path = tmp_path / "s.safetensors"
    about = {"tokens": 5, "fingerprint": "ab", "source": "text", "layers": [4, 11]}
    write_matrices(path, EARLIER_STATISTICS, statistics.moments, about)
    loaded = KeyStatistics.load(path)
    assert (loaded.tokens, list(loaded.moments)) == (5, [4, 11])
    assert (loaded.held_out, loaded.held_out_tokens) == ({}, 0)


def test_a_failed_write_keeps_the_existing_file(statistics, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    before = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr("rlsedit_fast.files.os.fsync", full)
    with pytest.raises(InputError, match="no space"):
        KeyStatistics({4: torch.zeros(6, 6)}, 1, "cd" * 32, "other").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_raises(statistics, tmp_path):
    path = tmp_path / "s.safetensors"
    statistics.save(path)
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for content in (whole[:-8], flipped, b"", b"no safetensors at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"s\.safetensors' is damaged"):
            KeyStatistics.load(path)


def test_a_file_of_another_kind_raises(statistics, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"4": torch.zeros(6, 6)}, path)
    with pytest.raises(InputError, match=r"model\.safetensors' is a safetensors file of another program; expected"):
        KeyStatistics.load(path)
    with pytest.raises(InputError, match=r"none\.safetensors' does not exist"):
        KeyStatistics.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "metadata", [{}, {"about": "{}"}, {"about": "{}", "sums": "[1]"}, {"about": "{", "sums": "{}"}]
)
def test_a_file_with_incomplete_metadata_raises(tmp_path, metadata):
    path = tmp_path / "s.safetensors"
    save_file({"4": torch.zeros(6, 6)}, path, metadata={"kind": "rlsedit-fast key statistics 1", **metadata})
    with pytest.raises(InputError, match=r"s\.safetensors' is damaged: its metadata cannot be read"):
        KeyStatistics.load(path)


def test_a_file_that_lacks_a_matrix_of_its_metadata_raises(tmp_path):
    path = tmp_path / "s.safetensors"
    metadata = {"kind": "rlsedit-fast key statistics 1", "about": "{}", "sums": '{"4": "ab", "5": "cd"}'}
    save_file({"4": torch.zeros(6, 6)}, path, metadata=metadata)
    with pytest.raises(InputError, match="layer 5 is missing"):
        KeyStatistics.load(path)
