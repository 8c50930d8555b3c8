"""The change report in a browser: layout, search, sorting, printing, and that nothing is loaded or logged."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from change_report import find_browser
from change_report_samples import HOSTILE, make_contents, make_gates, others

from rlsedit_fast.report.collect import collect
from rlsedit_fast.report.page import render

pytestmark = pytest.mark.deploy
WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = find_browser()
    if program is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The addresses of a report of 1,000 edits, and of one with hostile texts."""
    folder = tmp_path_factory.mktemp("pages")
    full = replace(collect(make_contents(1000), "edits"), measured=True, gates=make_gates(), others=others(60))
    hostile = collect(make_contents(2 * len(HOSTILE), hostile=True), HOSTILE[0])
    for name, report in (("full", full), ("hostile", hostile)):
        (folder / f"{name}.html").write_text(
            render(report, HOSTILE[1] if name == "hostile" else None), encoding="utf-8"
        )
    return {name: (folder / f"{name}.html").as_uri() for name in ("full", "hostile")}


@pytest.fixture
def visit(browser, pages):
    """Opens a page; at the end, nothing was logged and only the file itself was requested."""
    seen, contexts = [], []

    def open_page(name, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url) if request.url != pages[name] else None)
        page.goto(pages[name])
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["full", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_width(visit, name, width, scheme):
    page = visit(name, width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    outside = """() => [...document.querySelectorAll("body *")].filter(one => {
        const box = one.getBoundingClientRect();
        return box.width > 1 && box.right > innerWidth + 1 && !one.closest(".sr, svg");
    }).map(one => one.outerHTML.slice(0, 100))"""
    assert page.evaluate(outside) == []


def test_hostile_text_runs_no_script_and_is_visible(visit):
    page = visit("hostile")
    assert page.title() == "Change report: " + HOSTILE[1]
    assert page.locator("img, iframe").count() == 0
    assert HOSTILE[0] in page.locator("#edits tbody tr").first.inner_text()


@pytest.mark.parametrize("width", WIDTHS)
def test_search_filter_and_sorting(visit, width):
    from playwright.sync_api import expect

    page = visit("full", width)
    table, count = page.locator("#edits"), expect(page.locator("#edits .count"))
    shown = table.locator("tbody tr:visible")
    assert shown.count() == 100
    assert table.locator(".count").inner_text() == "1,000; first 100 shown"
    table.locator("input").fill("kyoto OSAKA 12")
    count.to_have_text(re.compile(r"^\d+ of 1,000"))
    texts = shown.all_text_contents()
    assert 0 < len(texts) < 50
    assert all("Kyoto" in text and "Osaka" in text and "12" in text for text in texts)
    table.locator("input").fill("no such text")
    count.to_have_text("0 of 1,000")
    assert shown.count() == 0
    table.locator("input").fill("")
    table.locator("select").select_option("not stated")
    count.to_have_text("25 of 1,000")
    assert shown.count() == 25
    table.locator("select").select_option("")
    if width < 500:  # without headers
        return
    table.get_by_role("button", name="NLL").click()
    figures = [float(text) for text in shown.locator("td:last-child").all_inner_texts()]
    assert figures == sorted(figures)
    table.get_by_role("button", name="NLL").click()
    assert float(shown.first.locator("td:last-child").inner_text()) == 6.1
    assert table.locator("th[aria-sort=descending]").inner_text().startswith("NLL")
    table.get_by_role("button", name="Show all 1,000").click()
    assert shown.count() == 1000


def test_without_scripts_all_rows_are_shown(visit):
    page = visit("full", java_script_enabled=False)
    assert page.locator("#edits tbody tr:visible").count() == 1000
    assert page.locator("#edits input:visible").count() == 0


def test_print_shows_all_rows_that_match_without_controls(visit):
    page = visit("full")
    page.emulate_media(media="print")
    assert page.locator("#edits tbody tr:visible").count() == 1000
    assert page.locator("input:visible, button.more:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
