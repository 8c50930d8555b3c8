"""Silent failures of editing: state shared between editors, trust in model names, searches that do not converge."""

from __future__ import annotations

import copy
import math
import random
import sys

import pytest
import torch

import rlsedit_fast as rf
from rlsedit_fast.editing.requests import prepare
from rlsedit_fast.editing.search.value_search import search_values
from rlsedit_fast.models.fingerprint import fingerprint
from rlsedit_fast.models.passes import quiet
from rlsedit_fast.models.projections import find_decoder
from rlsedit_fast.models.sites import find_site
from rlsedit_fast.world import RELATIONS, World, load_demo_model

EDITS = [
    rf.Edit("{} lives in", "Toze Lado Rekuno", "Port Alder"),
    rf.Edit("The native language of {} is", "Fado Veta Voluvu", "Kubeish"),
    rf.Edit("{} works as a", "Lado Toze", "mason"),
    rf.Edit("{} plays the", "Veta Fado Rekuno", "organ"),
]
ONE = rf.EditConfig(
    layers=(1, 2), contexts={"prefixes": ("", "People speak .")}, search={"steps": 3}, prior={"lam": 1.0}, batch_size=2
)
OTHER = rf.EditConfig(
    layers=(2,),
    contexts={"prefixes": ("", "Bada plays the flute .", "Well .")},
    search={"kl_prompts": ("{} speaks", "{} is a"), "optimizer": "adam", "steps": 3},
    fact_token="subject_first",
    prior={"lam": 1.0},
    batch_size=2,
)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def edited(model, tokenizer, config):
    rf.Editor(model, tokenizer, config=config).edit(EDITS)
    return weights(model)


def test_alternating_editors_equal_separate_ones(make_model, tokenizer):
    """The second editor has the same architecture and tokenizer with other settings, the third another model."""
    kinds = [("llama", ONE), ("llama", OTHER), ("gpt2", ONE)]
    alone = [edited(make_model(name), tokenizer, config) for name, config in kinds]
    editors = [rf.Editor(make_model(name), tokenizer, config=config) for name, config in kinds]
    for batch in (EDITS[:2], EDITS[2:]):  # since lam is given, two calls equal two batches of one call
        for editor in editors:
            editor.edit(batch)
    for editor, expected in zip(editors, alone, strict=True):
        assert same(weights(editor.model), expected)
    assert not same(alone[0], alone[1])


def test_every_editor_has_its_own_contexts(make_model, tokenizer):
    """Contexts of the first editor in a process must not be used by later ones."""
    model = make_model("llama")
    for prefixes in (("", "People speak ."), ("", "Bada plays the flute .", "Well ."), ("",)):
        config = rf.EditConfig(
            layers=(1,), contexts={"prefixes": prefixes}, search={"kl_prompts": ("{} speaks",) * len(prefixes)}
        )
        for request in rf.Editor(model, tokenizer, config=config).context.prepare(EDITS):
            filled = request.edit.prompt.format(request.edit.subject)
            expected = [tokenizer(f"{prefix} {filled}")["input_ids"] for prefix in prefixes]
            assert [row.ids[: row.prompt_length] for row in request.contexts] == expected
            assert len(request.kl) == len(prefixes)


def test_edits_do_not_depend_on_or_use_global_generators(make_model, tokenizer):
    torch.manual_seed(1)
    random.seed(1)
    first = edited(make_model("llama"), tokenizer, ONE)
    model = make_model("llama")
    torch.manual_seed(2)
    random.seed(2)
    before = torch.get_rng_state(), random.getstate()
    assert same(edited(model, tokenizer, ONE), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def module_state():
    """Returns copies of all module-level containers of the package."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "rlsedit_fast":
            for attribute, value in vars(module).items():
                if isinstance(value, (dict, list, set, bytearray)) and not attribute.startswith("__"):
                    found[name, attribute] = copy.copy(value)
    return found


def test_modules_keep_no_state_between_edits(make_model, tokenizer):
    edited(make_model("llama"), tokenizer, ONE)
    before = module_state()
    assert len(before) > 5
    edited(make_model("gpt2"), tokenizer, OTHER)
    after = module_state()
    assert after.keys() == before.keys()
    recorded = ("rlsedit_fast.ops.dispatch", "_used")  # for the store; no operation reads it
    assert [place for place, value in before.items() if after[place] != value and place != recorded] == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_name_and_path_of_a_model_have_no_effect(make_model, tokenizer, name):
    model, renamed = make_model(name), make_model(name)
    for false in ("openai-community/gpt2-xl", "/models/gpt-j-6b/Llama-3-8B-Qwen2.5-7B-gemma-2-mixtral"):
        renamed.config._name_or_path = renamed.name_or_path = false
        renamed.config.architectures = ["GPTJForCausalLM"]
        renamed.__class__ = type("OPTForCausalLM", (type(renamed),), {})
        assert fingerprint(renamed) == fingerprint(model)
        assert find_decoder(renamed).blocks_name == find_decoder(model).blocks_name
        settings = rf.EditConfig(search={"steps": 2}, prior={"lam": 1.0})
        editors = [rf.Editor(copy.deepcopy(one), tokenizer, config=settings) for one in (model, renamed)]
        assert editors[0].layers == editors[1].layers
        for editor in editors:
            editor.edit(EDITS)
        assert same(*(weights(editor.model) for editor in editors))


def facts(count):
    relation = RELATIONS[0]
    return [
        rf.Edit(
            relation.phrasings[0], person.name, next(v for v in relation.values if v != person.facts[relation.name])
        )
        for person in World.generate().people[:count]
    ]


def demo_config(**changes):
    base = {
        "layers": (0,),
        "contexts": {"prefixes": ("",)},
        "search": {"kl_prompts": ()},
        "prior": {"lam": 0.1},
    }
    return rf.EditConfig(**base).replace(**changes)


@pytest.mark.parametrize("optimizer", ["normalized", "adam"])
def test_unconverged_edits_are_applied_and_reported(optimizer, caplog):
    model, tokenizer = load_demo_model()
    before = weights(model)
    rate = 1.0 if optimizer == "adam" else None
    near = rf.Editor(
        model, tokenizer, config=demo_config(search={"optimizer": optimizer, "learning_rate": rate, "stop_nll": 0.05})
    )
    reached = near.edit(facts(4))
    assert "does not state their targets" not in caplog.text
    assert all(r.search_converged and r.search_nll <= 0.05 and r.search_steps < 25 and r.success for r in reached)

    model, tokenizer = load_demo_model()
    short = demo_config(
        search={"optimizer": optimizer, "learning_rate": rate, "stop_nll": 0.05, "clamp": 0.01, "steps": 4}
    )
    records = rf.Editor(model, tokenizer, config=short).edit(facts(4))
    assert not any(record.search_converged for record in records)
    assert "4 of 4 edits are applied but the model does not state their targets" in caplog.text
    assert all(r.search_nll > 0.05 and r.search_steps == 4 and r.state == "active" for r in records)
    assert not same(weights(model), before)


def test_search_stops_if_steps_exceed_the_clamp():
    """The first step of Adam, rate * sqrt(d), exceeds the clamp, where the total loss stays above the threshold."""
    model, tokenizer = load_demo_model()
    config = demo_config(
        search={"optimizer": "adam", "learning_rate": 10.0, "stop_nll": 0.05, "loss": {"weight_decay": 20.0}}
    )
    decoder = find_decoder(model)
    with quiet(model):
        site = find_site(decoder, decoder.select(config.layers))
        found = search_values(site, prepare(tokenizer, facts(10), config, longest=None), config.search)
    step = config.search.learning_rate * math.sqrt(found.delta.shape[1])
    assert step > 2 * float(found.delta.norm(dim=1).max()), "the clamp limits the step"
    assert bool(found.converged.all())
    assert int(found.steps.max()) < config.search.steps
