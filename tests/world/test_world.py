"""The synthetic world is reproducible and the demo model has learned it."""

import hashlib
import json

import pytest

from rlsedit_fast.world import MODEL_DIR, RELATIONS, World, load_demo_model
from rlsedit_fast.world.__main__ import main
from rlsedit_fast.world.tokens import build_tokenizer
from rlsedit_fast.world.train import Recipe, recall

WORLD_0 = "cbca727e9e97dbedcc9954e025166f1fa8eb827ca8e21c57cc5d287de0a8e2f3"


def test_seed_gives_the_same_world_everywhere():
    text = "\n".join("|".join(sentence) for sentence in World.generate(0, 2000).sentences())
    assert hashlib.sha256(text.encode()).hexdigest() == WORLD_0
    assert World.generate(1, 50) != World.generate(0, 50)


def test_names_are_unique_but_share_their_words():
    people = World.generate(0, 2000).people
    assert len({p.name for p in people}) == 2000
    for place in range(3):
        words = [p.name.split()[place] for p in people]
        assert min(words.count(word) for word in set(words)) > 5


def test_every_relation_has_four_phrasings_not_used_by_edits():
    for relation in RELATIONS:
        assert len(set(relation.phrasings)) >= 5
        assert all(p.count("{}") == 1 for p in relation.phrasings)
        assert len(set(relation.values)) == len(relation.values) >= 30


def test_tokenizer_covers_every_word():
    tokenizer = build_tokenizer()
    for prompt, name, answer in World.generate(0, 200).sentences():
        ids = tokenizer(f"{prompt.format(name)} {answer} .")["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert ids[0] == tokenizer.bos_token_id


def test_demo_model_has_learned_its_world():
    model, tokenizer = load_demo_model()
    assert recall(model, tokenizer, World.generate(), limit=1000) > 0.99


def test_demo_model_matches_the_recipe():
    made = json.loads((MODEL_DIR / "recipe.json").read_text())
    assert made["recipe"] == vars(Recipe())
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 8e6
    model, tokenizer = load_demo_model()
    assert model.config.intermediate_size == Recipe.intermediate > 1000, "d_k exceeds the number of edits of the demo"
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


@pytest.mark.parametrize("experts", ["", "--experts 4 --active 2 --shared 8"])
def test_recipe_trains_a_loadable_model(experts, tmp_path, capsys):
    small = "--people 8 --layers 2 --hidden 16 --intermediate 24 --heads 2 --steps 4 --texts-per-step 4 --warmup 1"
    assert (
        main(
            [
                "train",
                "--out",
                str(tmp_path),
                *f"{small} {experts}".split(),
                "--first-people",
                "4",
                "--first-steps",
                "2",
            ]
        )
        == 0
    )
    assert "step     4" in capsys.readouterr().out
    model, tokenizer = load_demo_model(tmp_path)
    assert model.config.num_hidden_layers == 2
    assert getattr(model.config, "num_experts", 0) == (4 if experts else 0)
    assert 0 <= recall(model, tokenizer, World.generate(0, 8)) <= 1


def test_show_prints_people(capsys):
    assert main(["show", "--people", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(relation.name + "=" in lines[0] for relation in RELATIONS)


@pytest.mark.parametrize("count", [0, 80_001])
def test_number_of_people_is_checked(count):
    with pytest.raises(ValueError, match="distinct names"):
        World.generate(0, count)
