"""The layer search on the demo model: every trial is measured, and the model does not change."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from rlsedit_fast.cli import main
from rlsedit_fast.cli.layers import named
from rlsedit_fast.data import Edit
from rlsedit_fast.errors import InputError, RequestError
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.generic_facts import MOST, generic_edits
from rlsedit_fast.evaluation.layers import (
    Trial,
    choose,
    compare,
    search_layers,
    single_layers,
    windows,
)
from rlsedit_fast.logs import warnings_silenced
from rlsedit_fast.world import RELATIONS, World, load_demo_model
from rlsedit_fast.world.tokens import save_tokenizer

WORLD = World.generate()
SETTINGS = CONFIG.replace(layers=None, search={"ahead": None, "steps": 15, "kl_prompts": (RELATIONS[0].phrasings[0],)})


def counterfactual_edits(count):
    edits = []
    for i, person in enumerate(WORLD.people[:count]):
        relation = RELATIONS[i % len(RELATIONS)]
        edits.append(
            Edit(
                relation.phrasings[0],
                person.name,
                next(value for value in relation.values if value != person.facts[relation.name]),
                paraphrases=(relation.phrasings[1].format(person.name),),
                neighborhood=(relation.phrasings[0].format(WORLD.people[100 + i].name),),
            )
        )
    return edits


def trial(layers, scores, kl):
    return Trial(
        layers=layers,
        efficacy=1.0,
        generalization=None,
        specificity=None,
        nll=0.1,
        paraphrase_nll=None,
        kl=kl,
        perplexity=1.0,
        change=0.1,
        converged=1.0,
        seconds=1.0,
        score=sum(scores) / len(scores),
        scores=tuple(scores),
    )


@pytest.fixture(scope="module")
def texts():
    return anchor_texts(WORLD, 0)[::20]


@pytest.fixture(scope="module")
def searched(texts):
    model, tokenizer = load_demo_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reported = []
    found = search_layers(
        model,
        tokenizer,
        counterfactual_edits(6),
        texts,
        config=SETTINGS,
        widths=(2,),
        on_trial=lambda trial, done, of: reported.append((trial, done, of)),
    )
    return found, reported, before, model


def test_every_trial_is_measured_and_reported(searched):
    found, reported, _, model = searched
    depth = model.config.num_hidden_layers
    assert [one for one, _, _ in reported] == found.trials
    assert [done for _, done, _ in reported] == list(range(1, len(found.trials) + 1))
    assert all(done <= of for _, done, of in reported)
    assert {layers for layers in (t.layers for t in found.trials) if len(layers) == 1} >= {
        (layer,) for layer in single_layers(depth)
    }
    assert any(len(t.layers) == 2 for t in found.trials), "windows are also tried"
    assert not found.failed
    assert found.anchor_tokens > 0
    for one in found.trials:
        assert 0 <= one.efficacy <= 1
        assert one.generalization is not None
        assert one.specificity is not None
        assert len(one.scores) == 6
        assert one.score == pytest.approx(sum(one.scores) / 6)
        assert one.specificity / 3 < one.score < 1, "each edit has one prompt of each kind"
        assert one.change > 0
        assert one.kl >= 0
    assert max(one.efficacy for one in found.trials) > 0.5, "the edits are effective"


def test_warnings_are_silenced_inside_a_block_only(caplog):
    logger = logging.getLogger("rlsedit_fast.some.module")
    with warnings_silenced("rlsedit_fast.some"):
        logger.warning("dropped")
        logger.error("logged")
    logger.warning("logged again")
    assert caplog.messages == ["logged", "logged again"]


def test_the_search_does_not_change_the_model(searched):
    _, _, before, model = searched
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_recommended_layers_are_among_the_trials(searched):
    found, _, _, _ = searched
    assert found.trial(found.best).score == max(one.score for one in found.trials)
    assert found.trial(found.chosen).kl <= found.trial(found.best).kl
    assert found.trial(found.default).layers == found.default
    with pytest.raises(InputError, match="have no trial"):
        found.trial((99,))


def test_the_result_is_json(searched):
    found, _, _, _ = searched
    read = json.loads(json.dumps(found.to_json()))
    assert read["chosen"] == list(found.chosen)
    best = next(one for one in read["trials"] if one["layers"] == read["best"])
    assert best["behind_best"] == 0
    assert all(one["behind_best"] >= 0 for one in read["trials"])


def test_among_statistically_equal_trials_the_one_with_least_drift_is_chosen():
    best = trial((5,), [1, 1, 1, 1, 1, 1, 1, 1], kl=0.5)
    close = trial((6,), [1, 1, 1, 1, 1, 1, 1, 0], kl=0.1)
    far = trial((7,), [0, 0, 0, 0, 0, 1, 0, 0], kl=0.0)
    assert choose([best, close, far]) == (best, close)
    difference, error = compare(close, best)
    assert difference == pytest.approx(-0.125)
    assert error == pytest.approx(0.125)


@pytest.mark.parametrize("depth", [1, 2, 4, 12, 30, 32, 80])
def test_single_layers_are_within_the_model(depth):
    layers = single_layers(depth)
    assert layers
    assert layers == sorted(set(layers))
    assert layers[0] >= 0
    assert layers[-1] < max(1, depth - 1), "no later token reads the output of the last block"
    assert len(layers) <= 12


def test_windows_contain_the_layer_and_end_within_the_model():
    assert windows(5, 12, (3,)) == [(3, 4, 5), (4, 5, 6)]
    assert windows(0, 12, (3,)) == []
    assert windows(10, 12, (3,)) == [(8, 9, 10)]
    assert windows(5, 12, (1,)) == []
    assert all(5 in group for group in windows(5, 12))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"edits": counterfactual_edits(2)}, InputError, "at least 4"),
        (
            {"edits": [*counterfactual_edits(4), Edit("no placeholder", "nobody", "x")]},
            RequestError,
            "nothing was modified",
        ),
        ({"texts": ["one text"]}, InputError, "more running text"),
        ({"config": CONFIG}, InputError, "omit them"),
    ],
)
def test_invalid_arguments_of_the_layer_search_raise(changes, error, message, texts):
    model, tokenizer = load_demo_model()
    arguments = {"edits": counterfactual_edits(4), "texts": texts, "config": SETTINGS} | changes
    with pytest.raises(error, match=message):
        search_layers(model, tokenizer, arguments["edits"], arguments["texts"], config=arguments["config"])


def test_layers_are_printed_in_the_format_of_the_option():
    assert named([4, 5, 6]) == "4-6"
    assert named([4]) == "4"
    assert named([1, 4]) == "1,4"


def test_built_in_facts_are_complete():
    edits = generic_edits()
    assert len(edits) == MOST
    assert len({edit.subject for edit in edits}) == MOST, "edits of one subject would share a value"
    edited = {edit.prompt.format(edit.subject) for edit in edits}
    for edit in edits:
        assert edit.prompt.count("{}") == 1
        assert edit.subject in edit.paraphrases[0]
        assert edit.neighborhood[0] not in edited
    assert generic_edits(3) == edits[:3]
    for count in (0, MOST + 1):
        with pytest.raises(InputError, match=f"expected 1 to {MOST}"):
            generic_edits(count)


@pytest.fixture
def workdir(tmp_path, monkeypatch, texts):
    """The working directory with a checkpoint, facts, settings and text."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = load_demo_model()
    model.save_pretrained("base")
    save_tokenizer(tokenizer, tmp_path / "base")
    lines = [
        {"prompt": edit.prompt, "subject": edit.subject, "target": edit.target, "paraphrases": list(edit.paraphrases)}
        for edit in counterfactual_edits(5)
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "text.txt").write_text("\n".join(f"{text} {text}" for text in texts))
    (tmp_path / "settings.json").write_text(json.dumps({"contexts": {"prefixes": [""]}, "search": {"steps": 5}}))
    return tmp_path


def test_the_command_prints_the_trials_and_writes_them(workdir, capsys):
    options = ["layers", "--model", "base", "--edits", "facts.jsonl", "--text", "text.txt", "--config", "settings.json"]
    assert main([*options, "--widths", "--tokens", "500", "--json", "found.json"]) == 0
    out = capsys.readouterr().out
    found = json.loads((workdir / "found.json").read_text())
    assert f"recommended: --layers {named(found['chosen'])} " in out
    assert found["edits"] == 5
    assert found["anchor_tokens"] == 500
    assert all(one["specificity"] is None for one in found["trials"]), "the file has no neighborhood"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "omit --layers"),
        (["--count", "1000"], "built-in list"),
        (["--limit", "3"], "--limit"),
    ],
)
def test_the_command_rejects_invalid_options(workdir, capsys, options, message):
    assert main(["layers", "--model", "base", "--text", "text.txt", *options]) == 2
    assert message in capsys.readouterr().err
