"""Settings are what their fields say, or are refused when they are made, with what was given and what is expected."""

from dataclasses import asdict, fields

import pytest

from rlsedit_fast.editing.config import _EXPECTED, EditConfig
from rlsedit_fast.editing.presets import PRESETS, preset
from rlsedit_fast.errors import InputError

WRONG = [
    ("layers", 3, "block index"),
    ("layers", (True,), "block index"),
    ("layers", (1.0,), "block index"),
    ("layers", "12", "block index"),
    ("layers", (2, 2), "none twice"),
    ("layer_module", 3, "a dotted name"),
    ("projection_module", ("mlp", "down_proj"), "a dotted name"),
    ("batch_size", "ten", "a whole number of at least 1"),
    ("batch_size", 2.5, "a whole number of at least 1"),
    ("batch_size", True, "a whole number of at least 1"),
    ("batch_size", None, "a whole number of at least 1"),
    ("search_ahead", 1.5, "at least 1, or None"),
    ("search_memory", "8G", "at least 1, or None"),
    ("delay", 1.5, "a whole number of at least 0"),
    ("context_samples", None, "a whole number of at least 0"),
    ("context_seed", "x", "a whole number of at least 0"),
    ("context_seed", 2**64, r"below 2\^64"),
    ("context_prefixes", ("", 3), "texts, at least one"),
    ("context_prefixes", "", "texts, at least one"),
    ("kl_prompts", "{} is a", "texts with one"),
    ("kl_prompts", (3,), "texts with one"),
    ("rule", ["rls"], "one of rls"),
    ("rule_options", 3, "a mapping of options"),
    ("rule_options", None, "a mapping of options"),
    ("norm_anchor", "yes", "True or False"),
    ("key_rows", "each", "one of contexts, mean, or None"),
    ("refine", -1, "at least 0, or None"),
    ("refine", True, "at least 0, or None"),
    ("keys", 16, "one of full, fp16, or None"),
    ("adherence", None, "a share strictly between 0 and 1"),
    ("adherence", "0.9", "a share strictly between 0 and 1"),
    ("lam", "1", "or None to calibrate it"),
    ("lam", 10**400, "or None to calibrate it"),
    ("mu", True, "or None to calibrate it"),
    ("clamp", None, "a finite number above 0"),
    ("clamp", float("nan"), "a finite number above 0"),
    ("search_rate", "fast", "above 0, or None"),
    ("kl_factor", None, "a finite number of at least 0"),
    ("search_stop_nll", (0.05,), "a finite number of at least 0"),
]


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_what_a_field_cannot_be_is_refused_in_words(name, value, expected):
    with pytest.raises(InputError, match=f"{name}=.*expected.*{expected}"):
        EditConfig(**{name: value})


def test_every_field_is_looked_at_once():
    named = [name for names, _, _ in _EXPECTED for name in names.split()]
    assert sorted([*named, "rule", "rule_options"]) == sorted(field.name for field in fields(EditConfig))


def test_lists_as_a_file_of_settings_has_them_are_tuples():
    made = EditConfig(layers=[1, 2], contexts={"prefixes": ["", "So ."]}, search={"kl_prompts": []})
    assert made == EditConfig(layers=range(1, 3), contexts={"prefixes": ("", "So .")}, search={"kl_prompts": ()})
    assert (made.layers, hash(made)) == ((1, 2), hash(EditConfig(**asdict(made))))


@pytest.mark.parametrize("name", [*PRESETS, "generic"])
def test_whole_numbers_are_numbers(name):
    assert preset(name, prior={"lam": 1, "mu": 3}, search={"clamp": 2, "kl_prompts": ()}).clamp == 2


def test_what_none_stands_for_goes_with_the_rule_and_the_keys():
    def effective(**changes):
        config = EditConfig(**changes)
        return config.effective_rows, config.effective_refine

    assert effective() == ("contexts", 2)
    assert effective(keys="fp16", refine=3) == ("contexts", 3)
    assert effective(keys=None) == ("contexts", 0)
    assert effective(key_rows="mean", refine=0) == ("mean", 0)
    assert effective(rule="memit") == ("mean", 0)


def test_to_refine_edits_whose_rows_are_not_kept_is_refused():
    with pytest.raises(InputError, match=r"refine=1 .*keys=None keeps no rows"):
        EditConfig(refine=1, stored_rows=None)
    assert EditConfig(refine=0, stored_rows=None).effective_refine == 0
