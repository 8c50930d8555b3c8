"""Invalid settings raise on construction, with the given value and the expected one."""

import pickle

import pytest
from pydantic import ValidationError

from rlsedit_fast.editing.config import EditConfig, ValueSearchConfig
from rlsedit_fast.editing.presets import PRESETS
from rlsedit_fast.errors import InputError

WRONG = [
    ({"layers": 3}, "layers=3: expected a list of layer indices such as"),
    ({"layers": (True,)}, r"layers\[0\]=True: expected an integer"),
    ({"layers": (1.0,)}, r"layers\[0\]=1.0: expected an integer"),
    ({"layers": (-1,)}, r"layers\[0\]=-1: expected a number of at least 0"),
    ({"layers": "12"}, "layers='12': expected"),
    ({"layers": (2, 2)}, r"layers=\(2, 2\): expected at least one layer index, each given once"),
    ({"layers": ()}, r"layers=\(\): expected at least one"),
    ({"layer_module": 3}, "layer_module=3: expected a string"),
    ({"projection_module": ("mlp", "down_proj")}, "projection_module=.*: expected a string"),
    ({"batch_size": "ten"}, "batch_size='ten': expected an integer"),
    ({"batch_size": 2.5}, "batch_size=2.5: expected an integer"),
    ({"batch_size": True}, "batch_size=True: expected an integer"),
    ({"batch_size": None}, "batch_size=None: expected an integer"),
    ({"batch_size": 0}, "batch_size=0: expected a number of at least 1"),
    ({"search": {"ahead": 1.5}}, "search: ahead=1.5: expected an integer"),
    ({"search": {"memory": "8G"}}, "search: memory='8G': expected an integer"),
    ({"delay": 1.5}, "delay=1.5: expected an integer"),
    ({"contexts": {"samples": None}}, "contexts: samples=None: expected an integer"),
    ({"contexts": {"seed": "x"}}, "contexts: seed='x': expected an integer"),
    ({"contexts": {"seed": 2**64}}, "contexts: seed=18446744073709551616: expected"),
    ({"contexts": {"prefixes": ("", 3)}}, "contexts: prefixes\\[1\\]=3: expected a string"),
    ({"contexts": {"prefixes": ""}}, "contexts: prefixes='': expected a list of strings"),
    ({"contexts": {"prefixes": ("So .",)}}, "contexts: prefixes=.*: expected '' first"),
    ({"contexts": 3}, "contexts=3: expected a dict of settings or a ContextConfig"),
    ({"search": {"kl_prompts": "{} is a"}}, "search: kl_prompts=.*: expected a list of strings with"),
    ({"search": {"kl_prompts": (3,)}}, "search: kl_prompts\\[0\\]=3: expected a string"),
    ({"search": {"kl_prompts": ("He is a",)}}, "search: kl_prompts: 'He is a': expected '{}' once"),
    ({"rule": ["rls"]}, "rule=.*: expected a string"),
    ({"rule": "rls2"}, "rule='rls2': expected rls, or a rule that cannot undo edits: ft, .*did you mean 'rls'"),
    ({"rule_options": 3}, "rule_options=3: expected a dict"),
    ({"rule_options": None}, "rule_options=None: expected a dict"),
    ({"norm_anchor": "yes"}, "norm_anchor='yes': expected True or False"),
    ({"contexts": {"rows": "each"}}, "contexts: rows='each': expected 'contexts' or 'mean'"),
    ({"refine": -1}, "refine=-1: expected a number of at least 0"),
    ({"refine": True}, "refine=True: expected an integer"),
    ({"stored_rows": 16}, "stored_rows=16: expected 'full' or 'fp16'"),
    ({"prior": {"adherence": None}}, "prior: adherence=None: expected a number"),
    ({"prior": {"adherence": "0.9"}}, "prior: adherence='0.9': expected a number"),
    ({"prior": {"adherence": 1}}, "prior: adherence=1: expected a number above 0 and below 1"),
    ({"adherance": 0.9}, "unknown setting 'adherance'; did you mean prior="),
    ({"prior": {"adherance": 0.9}}, "prior: unknown setting 'adherance'; did you mean adherence"),
    ({"prior": {"lam": "1"}}, "prior: lam='1': expected a number"),
    ({"prior": {"lam": 10**400}}, "prior: lam=1000.*: expected a number"),
    ({"prior": {"mu": True}}, "prior: mu=True: expected a number"),
    ({"search": {"clamp": None}}, "search: clamp=None: expected a number"),
    ({"search": {"clamp": float("nan")}}, "search: clamp=nan: expected"),
    ({"search": {"learning_rate": "fast"}}, "search: learning_rate='fast': expected a number"),
    ({"search": {"loss": {"kl_factor": None}}}, "search: loss: kl_factor=None: expected a number"),
    ({"search": {"stop_nll": (0.05,)}}, "search: stop_nll=.*: expected a number"),
    ({"search": {"stop": "loss"}}, "stop='loss' has no meaning for optimizer='constrained'"),
    ({"search": {"loss": {"weight_decay": 0.1}}}, "loss=.* has no meaning for optimizer='constrained'"),
    ({"adherence": 0.9}, "unknown setting 'adherence'; it belongs to a group: prior="),
    ({"batchsize": 3}, "unknown setting 'batchsize'; did you mean batch_size"),
    ({"search": {"step": 3}}, "search: unknown setting 'step'; did you mean steps"),
    ({"mom2_update_weight": -1}, "mom2_update_weight=-1: expected a finite number of at least 0"),
    ({"v_lr": 0.5, "search": {"learning_rate": 0.1}}, "v_lr and search.learning_rate are the same setting"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=str)
def test_invalid_settings_name_the_setting_the_value_and_what_is_expected(settings, message):
    with pytest.raises(InputError, match=message):
        EditConfig(**settings)
    with pytest.raises(InputError, match=message):
        EditConfig().replace(**settings)


def test_setting_names_of_peft_and_memit_are_accepted():
    config = EditConfig(
        layers_to_transform=[3, 4], v_num_grad_steps=20, clamp_norm_factor=0.5, mom2_update_weight=16, kl_factor=0.1
    )
    assert config.layers == (3, 4)
    assert (config.search.steps, config.search.clamp, config.prior.mu) == (20, 0.5, 4.0)
    assert (config.search.optimizer, config.search.loss.kl_factor) == ("adam", 0.1)
    assert EditConfig(search=ValueSearchConfig(steps=7), v_lr=0.5).search.steps == 7
    assert EditConfig(v_lr=0.5, search={"optimizer": "normalized"}).search.optimizer == "normalized"


def test_settings_round_trip_through_dicts_files_and_pickle(tmp_path):
    config = EditConfig(layers=[1], search={"steps": 3}, rule="rect", rule_options={"share": 0.4})
    assert EditConfig(**config.to_dict()) == config
    assert pickle.loads(pickle.dumps(config)) == config
    whole = EditConfig(rule="ft", rule_options={"steps": 25}, same_subject="separate")
    assert EditConfig(**whole.to_dict()).rule_options == {"steps": 25}
    config.save_pretrained(tmp_path / "new")
    assert EditConfig.from_pretrained(tmp_path / "new") == config
    assert EditConfig.from_pretrained(tmp_path / "new" / "edit_config.json") == config
    (tmp_path / "wrong.json").write_text('{"batch_size": 0}')
    with pytest.raises(InputError, match=r"wrong.json: batch_size=0: expected"):
        EditConfig.from_pretrained(tmp_path / "wrong.json")
    with pytest.raises(InputError, match=r"none: cannot be read as JSON"):
        EditConfig.from_pretrained(tmp_path / "none")
    (tmp_path / "memit.json").write_text('{"layers_to_transform": [3], "mom2_update_weight": 16}')
    assert EditConfig.from_pretrained(tmp_path / "memit.json").prior.mu == 4.0


def test_equal_settings_have_equal_hashes():
    config = EditConfig(layers=[1], rule="rect", rule_options={"share": 0.4})
    assert hash(config) == hash(EditConfig(**config.to_dict()))
    assert len({config, config.replace(batch_size=7), config.replace(rule_options={"share": 0.5})}) == 3


def test_a_dict_changes_single_settings_of_a_group():
    config = EditConfig(search={"steps": 3, "clamp": 1.0}).replace(search={"clamp": 2.0}, batch_size=5)
    assert (config.search.steps, config.search.clamp, config.batch_size) == (3, 2.0, 5)
    with pytest.raises(ValidationError, match="frozen"):
        config.batch_size = 3


def test_lists_become_tuples():
    config = EditConfig(layers=[1, 2], contexts={"prefixes": ["", "So ."]}, search={"kl_prompts": []})
    assert config == EditConfig(layers=range(1, 3), contexts={"prefixes": ("", "So .")}, search={"kl_prompts": ()})
    assert config.layers == (1, 2)


@pytest.mark.parametrize("name", [*PRESETS, "generic"])
def test_integers_are_accepted_for_float_settings(name):
    assert (
        EditConfig.from_preset(name, prior={"lam": 1, "mu": 3}, search={"clamp": 2, "kl_prompts": ()}).search.clamp == 2
    )


def test_the_default_of_rows_and_refine_depends_on_the_rule_and_the_stored_rows():
    def effective(**changes):
        config = EditConfig(**changes)
        return config.effective_rows, config.effective_refine

    assert effective() == ("contexts", 2)
    assert effective(stored_rows="fp16", refine=3) == ("contexts", 3)
    assert effective(stored_rows=None) == ("contexts", 0)
    assert effective(contexts={"rows": "mean"}, refine=0) == ("mean", 0)
    assert effective(rule="memit") == ("mean", 0)


def test_refine_without_stored_rows_raises():
    with pytest.raises(InputError, match="refine=1 requires stored rows"):
        EditConfig(refine=1, stored_rows=None)
    assert EditConfig(refine=0, stored_rows=None).effective_refine == 0
