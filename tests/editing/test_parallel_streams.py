"""Long streams of edits, undos, replacements and a protection in several processes, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .. import conftest
from . import parallel_worker as worker
from .test_parallel import read, run

pytestmark = pytest.mark.soak

MODELS = Path.home() / ".cache" / "rlsedit" / "models"
RANKS = (2, 3)
EDITS = 300
WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}  # for three processes
LAYOUTS = conftest.OTHER_FAMILIES | {"llama": ("Llama", conftest.GROUPED)}
ALLOWED = {"float64": 1e-6, "float32": 1e-3}
"""Relative differences. A step of the search multiplies the rounding errors of the sums over processes."""


def save(folder, tokenizer, family):
    prefix, settings = LAYOUTS[family]
    seed = 40 + worker.FAMILIES.index(family)
    conftest.maker(prefix, settings | WIDE, seed)(len(tokenizer)).save_pretrained(folder / family)
    tokenizer.save_pretrained(folder / family)


def difference(found, expected):
    """Returns the norm of the difference relative to that of what is expected."""
    found, expected = (torch.as_tensor(one, dtype=torch.float64) for one in (found, expected))
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def differences(found, alone):
    """Returns the largest relative difference of changes of weights, C, numbers of the records, and the objective."""
    first, expected = found["changed"], alone["changed"]
    worst = {
        "weights": max(
            difference(one - original, other - original)
            for one, other, original in zip(first["weights"], expected["weights"], alone["originals"], strict=True)
        )
    }
    for name in ("covariance", "numbers", "objectives", "priors"):
        worst[name] = max(difference(one, other) for one, other in zip(first[name], expected[name], strict=True))
    return worst


def compare(folder, family, world, allowed):
    """Compares what each process found, and its checkpoint, with a single process."""
    (alone,), found = read(folder, "long", family, 1), read(folder, "long", family, world)
    worst = differences(found[0], alone)
    print(f"{family}, {world} processes: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    assert max(worst.values()) <= allowed, worst
    for each in found:
        assert each["changed"]["records"] == alone["changed"]["records"]
        assert each["changed"]["objectives"] == found[0]["changed"]["objectives"]
        assert all(map(torch.equal, each["changed"]["weights"], found[0]["changed"]["weights"]))
        assert all(map(torch.equal, each["originals"], alone["originals"]))
        assert each["fingerprint"] == alone["fingerprint"]
    base, single, several = (
        load_file(place / "model.safetensors")
        for place in (folder / family, *(folder / f"{family}-{count}" / "checkpoint" for count in (1, world)))
    )
    assert base.keys() == single.keys() == several.keys()
    edited = {f"{name}.weight" for name in alone["edited"]}
    assert {name for name in base if not torch.equal(base[name], several[name])} == edited
    for name in edited:
        assert difference(several[name] - base[name], single[name] - base[name]) <= allowed
    return alone


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", worker.FAMILIES)
def test_300_edits_and_100_undos_are_as_in_one_process(tmp_path, tokenizer, family, dtype):
    save(tmp_path, tokenizer, family)
    for world in (1, *RANKS):
        run(tmp_path, world, f"long/{family}/{EDITS}/{dtype}", timeout=3000)
    for world in RANKS:
        alone = compare(tmp_path, family, world, ALLOWED[dtype])
        states = [record[worker.FIELDS.index("state")] for record in alone["changed"]["records"]]
        assert states.count("undone") == EDITS // 3
        assert "replaced" in states
        assert len(states) > EDITS


def test_smollm2_is_edited_in_three_processes_as_in_one(tmp_path):
    """Two processes do not divide its 9 heads."""
    source = MODELS / "smollm2"
    if not source.is_dir():
        pytest.skip(f"no checkpoint in {source}; bench/real_models.py smollm2 builds it")
    (tmp_path / "smollm2").symlink_to(source)
    for world in (1, 3):
        run(tmp_path, world, "long/smollm2/12/float64/3/3", timeout=3000)
    compare(tmp_path, "smollm2", 3, ALLOWED["float64"])
