"""The training of the CounterFact model: it learns the facts and can be resumed."""

import json
from dataclasses import asdict

import counterfact_lm
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlsedit_fast as rf
from rlsedit_fast.evaluation.scoring import score

ANSWERS = ("French", "English", "Port Louis", "Greek")


@pytest.fixture
def files(tmp_path):
    records = [
        {
            "case_id": i,
            "prompt": f"The mother tongue of Subject{i} Name is",
            "subject": f"Subject{i} Name",
            "target_new": ANSWERS[(i + 1) % 4],
            "ground_truth": ANSWERS[i % 4],
            "rephrase_prompt": f"Subject{i} Name speaks",
            "locality_prompt": f"Person{i} writes in",
            "locality_ground_truth": ANSWERS[(i + 2) % 4],
        }
        for i in range(6)
    ]
    (tmp_path / "cf.json").write_text(json.dumps(records))
    (tmp_path / "text.txt").write_text("A line of running text that says something about nothing at all .\n" * 40)
    return tmp_path


def options(files, out, **changes):
    settings = {"facts": 6, "vocabulary": 320, "layers": 2, "hidden": 32, "intermediate": 64, "heads": 2, "steps": 60}
    settings |= {"texts_per_step": 20, "text_length": 16, "warmup": 5, "learning_rate": 5e-3} | changes
    command = ["--data", files / "cf.json", "--text", files / "text.txt", "--out", out, "--full-precision"]
    command += ["--report-every", 20]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", value]
    return [str(part) for part in command]


def train(monkeypatch, files, out, **changes):
    monkeypatch.setattr("sys.argv", ["counterfact_lm.py", *options(files, out, **changes)])
    counterfact_lm.main()


def test_the_trained_model_states_the_facts_and_can_be_edited(files, monkeypatch):
    out = files / "model"
    train(monkeypatch, files, out, steps=150)
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["known"]["prompts and rephrasings"] >= 0.9
    assert not (out / "training.pt").exists()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    questions = [("The mother tongue of Subject2 Name is", "Port Louis")]
    assert score(model, tokenizer, questions)[0].exact, "loaded with transformers"
    editor = rf.Editor(
        model.eval(), tokenizer, config=rf.EditConfig(layers=(0,), prior={"lam": 0.1}, search={"steps": 40})
    )
    assert editor.edit([rf.Edit("The mother tongue of {} is", "Subject2 Name", "Greek")])[0].id == 1


def test_an_interrupted_training_gives_the_weights_of_an_uninterrupted_one(files, monkeypatch):
    whole, halves = files / "whole", files / "halves"
    train(monkeypatch, files, whole)
    real = counterfact_lm.batch_of

    def interrupted(step, *rest):
        if step == 50:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(counterfact_lm, "batch_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, files, halves)
    assert torch.load(halves / "training.pt")["step"] == 40
    monkeypatch.setattr(counterfact_lm, "batch_of", real)
    train(monkeypatch, files, halves)
    one, other = (AutoModelForCausalLM.from_pretrained(out).state_dict() for out in (whole, halves))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_checkpoint_of_another_recipe_raises(files, monkeypatch):
    out = files / "model"
    out.mkdir()
    recipe = asdict(counterfact_lm.Recipe())
    torch.save({"recipe": recipe}, out / "training.pt")
    with pytest.raises(SystemExit, match="another recipe"):
        train(monkeypatch, files, out)
