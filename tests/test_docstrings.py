"""Runs the examples in the docstrings of public names."""

from __future__ import annotations

import doctest
import importlib

import pytest

PACKAGES = (
    "rlsedit_fast",
    "rlsedit_fast.rls",
    "rlsedit_fast.baselines",
    "rlsedit_fast.data",
    "rlsedit_fast.statistics",
)


def public_objects():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            if callable(value := getattr(module, name)):
                yield pytest.param(value, id=f"{package}.{name}")


@pytest.mark.parametrize("value", list(public_objects()))
def test_examples(value):
    tests = doctest.DocTestFinder(recurse=True).find(value, value.__name__, globs={})
    assert sum(len(test.examples) for test in tests) > 0, "a public name has no example"
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
