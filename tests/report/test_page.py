"""The page of a change report: its text, hostile text in edits, and that it needs nothing else."""

from __future__ import annotations

import builtins
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from change_report_samples import HOSTILE, make_contents, make_gates, others

from rlsedit_fast.errors import InputError
from rlsedit_fast.report.charts import change_chart, layer_chart, retention_chart
from rlsedit_fast.report.collect import Age, collect
from rlsedit_fast.report.page import render, share, shown

VOID = {"meta", "link", "input", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Counts tags, collects addresses and the visible text, and checks that the tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.text, self.open = {}, [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def full():
    report = collect(make_contents(120), "edits")
    return replace(report, measured=True, gates=make_gates(), others=others(30))


def test_page_states_every_edit_and_what_is_to_be_read_first(full):
    page = Page(render(full, "A release"))
    text = "".join(page.text)
    assert page.open == []
    assert "A release" in text
    assert "1 of 5 gates violated" in text
    assert "1 of 5 gates not measured" in text
    assert "3 active edits not stated: 7, 47, 87" in text
    assert "2 edits undone" in text
    assert "the value search did not converge in 12 steps: rank 40, NLL 0.01" in text
    assert f"{len(full.moved)} other answers changed" in text
    for row in full.edits:
        assert row.prompt in text
        assert row.target in text
    assert page.tags["tr"] > 120 + 30 + 5
    assert page.tags["svg"] == 3


def test_page_loads_nothing_and_has_no_scripts_but_its_own():
    page = Page(render(collect(make_contents(2 * len(HOSTILE), hostile=True), "edits")))
    assert page.open == []
    assert {tag: page.tags.get(tag, 0) for tag in ("script", "img", "iframe", "link")} == {
        "script": 1,
        "img": 0,
        "iframe": 0,
        "link": 1,
    }
    assert all(address == "data:," or address.startswith("#") for address in page.addresses)
    assert page.handlers == []


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text(text):
    page = Page(str(shown(text)))
    assert page.open == []
    assert set(page.tags) <= {"bdi", "span", "details", "summary"}
    visible = "".join(page.text)
    if text.isprintable() and len(text) < 400:
        assert visible == text
    assert not re.search("[\u200b\u202a-\u202e\u2066-\u2069\u0007\u00ad]", visible)


def test_invisible_characters_are_shown_by_their_code():
    assert "U+200B" in shown("a\u200bb")
    assert "U+202E" in shown("\u202eab")
    assert "U+200D" in shown("a\u200db")
    assert "U+200D" not in shown("\U0001f468\u200d\U0001f469")
    assert "3,000 characters" in shown("x" * 3000)


def test_report_without_edits_and_with_one():
    for count in (0, 1):
        contents = make_contents(1)
        if not count:
            contents = replace(
                contents,
                records=[],
                edits={},
                protected=[],
                trace=[],
                status=replace(contents.status, layers=[], edits_left=None, spent=0.0),
            )
        page = Page(render(collect(contents, "edits")))
        assert page.open == []
        assert ("The store has no edits." in "".join(page.text)) == (not count)


def test_records_without_answers_are_said_to_have_none():
    contents = make_contents(3, chat=False)
    records = [replace(record, answer=None, answer_before=None) for record in contents.records]
    report = collect(replace(contents, records=records), "edits", asked=["What?"])
    text = "".join(Page(render(report)).text)
    assert text.count("not recorded") >= 6
    assert "1 prompts of --ask: the model was not loaded" in text
    assert "from the records of the store" in text.lower()
    assert "in a chat" not in text


def test_charts_are_drawn_from_their_data_in_the_colors_of_the_page():
    ages = [Age(1, 10, 9, 10), Age(11, 20, 10, 10), Age(21, 22, 0, 2)]
    chart = retention_chart(ages)
    assert {"1–10", "11–20", "21–22"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", chart))
    assert "var(--accent)" in chart
    assert not re.search(r"#0[1-5]0[1-5]0[1-5]|<metadata|<!DOCTYPE|<\?xml|https?://(?!www\.w3\.org)", chart)
    assert retention_chart(ages[:1]) == ""
    assert "budget 0.25" in change_chart([(10, 0.01), (20, 0.02)], 0.25, 500)
    assert change_chart([(10, 0.01)], 0.25, None) == ""
    layers = make_contents(1).status.layers
    assert "layer 7" in layer_chart(layers)
    assert layer_chart([replace(layer, weight=None) for layer in layers]) == ""


def test_shares_are_100_percent_only_if_exact():
    assert [share(999, 1000), share(99999, 100000), share(5, 5), share(0, 5), share(1, 10**6)] == [
        "99.9 %",
        "99.9 %",
        "100 %",
        "0 %",
        "0.1 %",
    ]


def test_replaced_edits_name_their_successor():
    contents = make_contents(3)
    first, second, third = contents.records
    same = replace(third, prompt=first.prompt, subject=first.subject)
    report = collect(replace(contents, records=[replace(first, state="replaced"), second, same]), "edits")
    assert report.edits[0].note == "replaced by edit 3"


def test_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    found = builtins.__import__

    def without(name, *args, **options):
        if name == "jinja2":
            raise ImportError("No module named 'jinja2'")
        return found(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"rlsedit-fast\[report\]"):
        render(collect(make_contents(1), "edits"))
