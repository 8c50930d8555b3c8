"""Model cards: metadata for the Hub, and text that no edit can break."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from rlsedit_fast import Edit, EditConfig, Editor
from rlsedit_fast.export.card import SHOWN, CardContents, CardEdit, escape, hub_name, make_card
from rlsedit_fast.world import load_demo_model

HOSTILE = (
    "a | b | c",
    "`code` ``` fence",
    "<script>alert(1)</script> <!-- x",
    "line\n\n# heading\n| x |\n---\nlicense: gpl",
    "[link](http://evil.example) ![image](x) https://evil.example",
    "*bold* _it_ ~~no~~ $math$ \\ end\\",
    "\u202eright to left\u0000",
    "&lt;b&gt; &#60;i&#62;",
    "www.evil.example, mail@evil.example, :smile: @user",
)


def render(card):
    """Returns the tokens of the body, as a GitHub-like renderer reads it."""
    body = ModelCard(card).text
    return MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(body)


def texts(tokens):
    return ["".join(child.content for child in one.children) for one in tokens if one.type == "inline"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_edits_stay_one_row_of_the_table(text):
    edits = [CardEdit(text, text, 1, 0.5), CardEdit("after", "it", 1, 0.5)]
    card = make_card(CardContents("org/base", 2, edits, settings={text: text}))
    tokens = render(card)
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    cells = [" ".join(one.split()) for one in texts(tokens)]
    assert cells.count(plain) == 4
    assert cells[-6:-4] == ["after", "it"] or cells[-5:-1] == ["after", "it", "1", "0.50"]
    assert not any(one.type in ("html_block", "fence", "hr") for one in tokens)
    inside = [child for one in tokens if one.type == "inline" for child in one.children]
    links = [child.attrs["href"] for child in inside if child.type == "link_open"]
    assert {link.split("/")[2] for link in links} == {"huggingface.co", "github.com", "arxiv.org"}
    assert not any(child.type in ("html_inline", "image", "strong_open", "code_inline") for child in inside)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"


def test_long_texts_and_long_lists_are_shortened():
    edits = [CardEdit(f"prompt {at} " + "x" * 1000, "target", 1, 0.1) for at in range(SHOWN + 7)]
    card = make_card(CardContents("org/base", len(edits), edits))
    assert "and 7 more edits, which are not listed." in card
    assert card.count("| prompt ") == SHOWN + 1  # with the header
    assert "x" * 201 not in card


def test_metadata_names_the_base_model_only_if_the_hub_has_it(tmp_path):
    assert ModelCard(make_card(CardContents("org/base", 1))).data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-editing", "rlsedit"],
    }
    local = tmp_path / "private" / "my-model"
    local.mkdir(parents=True)
    card = make_card(CardContents(str(local), 1), library="peft")
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data
    assert data["library_name"] == "peft"
    assert "my-model" in card
    assert "private" not in card
    cached = tmp_path / "models--org--name" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert hub_name(str(cached)) == "org/name"


@pytest.mark.parametrize(
    ("readme", "kept"),
    [
        (
            "---\nlicense: apache-2.0\nlanguage:\n- en\ntags: [x]\n---\ntext",
            {"license": "apache-2.0", "language": ["en"]},
        ),
        (
            "---\nlicense: other\nlicense_name: 'a: b'\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "a: b", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [\n---\n", {}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("no metadata", {}),
        (b"---\nlicense: \xff\n---\n", {}),
    ],
)
def test_the_license_of_the_base_model_is_kept(tmp_path, readme, kept):
    place = tmp_path / "README.md"
    place.write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    card = make_card(CardContents(str(tmp_path), 1))
    data = ModelCard(card).data.to_dict()
    assert {key: value for key, value in data.items() if key.startswith(("license", "language"))} == kept
    assert ("## License" in card) == ("license" in kept)


@pytest.fixture(scope="module")
def edited():
    config = EditConfig(layers=[0], prior={"lam": 0.1}, contexts={"prefixes": [""]})
    editor = Editor(*load_demo_model(), config=config)
    editor.edit([Edit("{} speaks", "Toze Lado Rekuno", "Nafiish"), Edit("{} plays the", "Toze Lado Rekuno", "harp")])
    editor.undo([2])
    return editor


def test_an_editor_writes_a_card_with_its_edits_and_figures(edited, tmp_path):
    stability = {
        "text": "a|b.txt",
        "before": {"perplexity": 10.0, "kl": 0.0, "tokens": 99},
        "after": {"perplexity": 11.5, "kl": 0.25, "tokens": 99},
    }
    edited.save_pretrained(tmp_path / "model", stability=stability)
    card = (tmp_path / "model" / "README.md").read_text()
    cells = texts(render(card))
    table = dict(pairwise(cells))
    (record, _) = edited.history()
    assert table["Toze Lado Rekuno speaks"] == "Nafiish"
    assert "harp" not in card
    assert table["active edits"] == "1"
    assert table["edited layers"] == "0"
    assert table["targets stated when last measured"] == f"{int(record.success)} of 1"
    assert table["perplexity on 99 tokens of a|b.txt"] == "11.500 (before the edits 10.000)"
    assert table["KL divergence from the base model there, nats per token"] == "0.2500"
    (layer,) = edited.deviation()
    assert table["weight change of layer 0 (Frobenius norm)"] == f"{layer.weight:.4g}, at most {layer.weight_bound:.4g}"
    assert "## Undo" in card


def test_a_card_of_the_user_is_replaced_only_on_request(edited, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="already exists"):
        edited.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="already exists"):
        edited.save_adapter(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    edited.save_adapter(tmp_path, overwrite=True)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


def test_escaped_text_is_on_one_line():
    assert "\n" not in escape("a\nb\r\u2028c")
