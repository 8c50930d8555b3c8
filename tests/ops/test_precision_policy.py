"""Effect of the precision of products on the solver: a small version of `bench/precision.py`."""

from __future__ import annotations

from functools import cache

import precision
import pytest
import torch

pytest.importorskip("rlsedit_fast.kernels", reason="needs an installed package: pip install -e .")

from rlsedit_fast.kernels.precision import PRECISIONS, REJECTED

SIZES = {"d": 128, "d_v": 16, "updates": 120, "batch": 2, "condition": 2e5}
NORM = 5.0  # norm of keys: strong edits remove nearly all of C in a direction


@cache
def measured(name, cut=False):
    return precision.stream(name, cut, NORM, **SIZES)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", [name for name in PRECISIONS if name != "ieee"])
def test_supported_precision_is_as_accurate_as_float32(name, cut):
    found, float32 = measured(name, cut), measured("ieee")
    assert found["updates"] == SIZES["updates"]
    assert found["C"] <= 2 * float32["C"]
    assert found["W"] <= 2 * float32["W"]
    assert found["positive_definite"]


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_precision_is_much_less_accurate(name):
    found, float32 = measured(name), measured("ieee")
    assert found["C"] is None or found["C"] > 5 * float32["C"]


@pytest.mark.parametrize("name", ["tf32", "bf16"])
def test_low_precision_loses_positive_definiteness(name):
    assert not measured(name)["positive_definite"]


def test_accuracy_of_split_numbers():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    x = torch.cat((x, x * 2.0**20, torch.tensor([1.0, 1 + 2.0**-11, 1 - 2.0**-12, -(1 + 2.0**-11)])))
    for name, bits in {"tf32": 11, "tf32x3": 22, "bf16": 8, "bf16x3": 16, "bf16x6": 24}.items():
        taken = precision.parts(x, name)
        left = x.double() - sum(part.double() for part in taken)
        assert (left.abs() <= 2.0**-bits * x.double().abs()).all()
        kept = 0x1FFF if name.startswith("tf32") else 0xFFFF
        assert all((part.view(torch.int32) & kept == 0).all() for part in taken)
    assert precision.tf32(torch.tensor(1 + 2.0**-11)) == 1 + 2.0**-10  # ties away from zero


def test_truncated_sums_do_not_exceed_exact_sums():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(7, 40, generator=generator), torch.rand(40, 9, generator=generator)
    exact = a.double() @ b.double()
    found = precision.cut_product(a, b).double()
    assert (found <= exact).all()
    assert (found >= exact * (1 - 5 * 2.0**-23)).all()
    assert (found < exact).any()
