"""Runs the examples in the docstrings of public names. A public name without an example fails."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import itertools
import sys

import pytest

PACKAGES = (
    "rlsedit_fast",
    "rlsedit_fast.baselines",
    "rlsedit_fast.data",
    "rlsedit_fast.errors",
    "rlsedit_fast.evaluation",
    "rlsedit_fast.export",
    "rlsedit_fast.models",
    "rlsedit_fast.ops",
    "rlsedit_fast.rls",
    "rlsedit_fast.statistics",
    "rlsedit_fast.store",
    "rlsedit_fast.world",
)


def public_names():
    for package in PACKAGES:
        for name in importlib.import_module(package).__all__:
            yield pytest.param(package, name, id=f"{package}.{name}")


def constant_docstring(package, name):
    """Returns the string after the assignment of a constant in a module of the package, or an empty string."""
    for module in [module for key, module in sys.modules.items() if key == package or key.startswith(f"{package}.")]:
        body = ast.parse(inspect.getsource(module)).body
        for statement, following in itertools.pairwise(body):
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                return str(following.value.value) if is_text else ""
    return ""


def examples(package, name):
    """Returns the docstring examples of a class with its methods, of a function, or of a constant."""
    value = getattr(importlib.import_module(package), name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return doctest.DocTestFinder(recurse=True).find(value, name, globs={})
    text = inspect.cleandoc(constant_docstring(package, name))
    return [doctest.DocTestParser().get_doctest(text, {}, name, package, 0)]


@pytest.mark.parametrize(("package", "name"), list(public_names()))
def test_examples(package, name):
    tests = examples(package, name)
    own = next(test for test in tests if test.name == name)
    assert own.examples, "a public name has no example"
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_examples_of_methods_run():
    names = {test.name for test in examples("rlsedit_fast.store", "Store") if test.examples}
    assert names > {"Store"}
