"""Tests marked gpu are skipped where there is no GPU; whatever torch allocates in these tests starts as NaN."""

from __future__ import annotations

import pytest
import torch


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In this mode torch.empty is filled with NaN, so an output or workspace element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
