"""How a target continues a prompt."""

import pytest

from rlsedit_fast.models.joins import join_texts, trimmed_prompt


@pytest.mark.parametrize(
    ("prompt", "target", "whole"),
    [
        ("The capital of Peru is", "Lima", "The capital of Peru is Lima"),
        ("The capital of Peru is ", " Lima ", "The capital of Peru is Lima"),
        ('{"country": "Peru", "capital": "', 'Lima"}', '{"country": "Peru", "capital": "Lima"}'),
        ('{"capital":"', "Lima", '{"capital":"Lima'),
        ('He said "no"', "again", 'He said "no" again'),
        ("the so-called '", "Lima'", "the so-called 'Lima'"),
        ("the Smiths'", "house", "the Smiths' house"),
        ("Run `", "ls`", "Run `ls`"),
        ("It is **", "Lima**", "It is **Lima**"),
        ("f(", "x)", "f(x)"),
        ("f(x)", "is", "f(x) is"),
        ("a[", "0]", "a[0]"),
        ("See “", "Lima”", "See “Lima”"),
        ("https://", "example.org", "https://example.org"),
        ("It costs $", "5", "It costs $5"),
        ("It costs $ ", "5", "It costs $ 5"),
        ("Es kostet 5 €", "mehr", "Es kostet 5 €mehr"),
        ("Write to @", "ann", "Write to @ann"),
        ("issue #", "5", "issue #5"),
        ("COVID-", "19", "COVID-19"),
        ("Peru -", "Lima", "Peru - Lima"),
        ("Capital:", "Lima", "Capital: Lima"),
        ("Question?\n", "Lima", "Question?\nLima"),
        ("def f(x):\n    ", "return x", "def f(x):\n    return x"),
        ("def f(a, b):", "\n    return a - b", "def f(a, b):\n    return a - b"),
        ("def f(a, b):", "\n    return a - b\n", "def f(a, b):\n    return a - b\n"),
        ("x =", "\t1", "x =\t1"),
        ("日本の首都は", "東京", "日本の首都は東京"),
        ("프랑스의 수도는", "파리", "프랑스의 수도는 파리"),
        ("", "Lima", "Lima"),
    ],
)
def test_auto_puts_a_space_where_one_is_written(prompt, target, whole):
    assert "".join(join_texts(prompt, target)) == whole


def test_space_always_puts_one_space():
    assert join_texts("f( ", " x ", "space") == ("f(", " x")
    assert join_texts("東京", "都", "space") == ("東京", " 都")


def test_exact_keeps_every_character():
    assert join_texts(" un ", " likely ", "exact") == (" un ", " likely ")
    assert join_texts("un", "likely", "exact") == ("un", "likely")


@pytest.mark.parametrize("prompt", ["The capital is", ' "x": "', "It costs $ ", " a \n", "def f():\n    ", "( "])
def test_trimming_a_prompt_does_not_change_how_it_is_continued(prompt):
    once = trimmed_prompt(prompt)
    assert "".join(join_texts(once, "x")) == "".join(join_texts(prompt, "x")).lstrip()
    assert trimmed_prompt(once) == once
