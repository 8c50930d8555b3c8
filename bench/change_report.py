"""Measures how long Chromium takes to open a change report (`rlsedit report`) and to search in it.

    python bench/change_report.py --json bench/results/change-report.json

The reports have 1,000 and 5,000 edits with answers raw and in a chat, and half as many other prompts; a page with one
word is measured for comparison. Each is opened in a new context of the browser at the widths of a phone and of a
screen. `seconds_opened` is the time from the navigation to the second frame after the load event, when the page is
drawn and its tables can be searched. `seconds_processor` is the processor time of the renderer process until then,
which depends less on other programs that run. `seconds_searched` is the time from typing into the search field to the
frame with the result. Needs `pip install playwright` and an installed Chromium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from change_report_samples import make_contents, make_gates, others
from recording import add_json, record

from rlsedit_fast.report.collect import collect
from rlsedit_fast.report.page import render

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HEIGHT = 900
TIMEOUT = 120_000  # milliseconds, for machines that are busy
DRAWN = """() => new Promise(done => {
    const draw = () => requestAnimationFrame(() => requestAnimationFrame(done));
    document.readyState === "complete" ? draw() : addEventListener("load", draw);
})"""
SEARCH = """() => new Promise(done => {
    const box = document.querySelector("#edits"), input = box.querySelector("input"), began = performance.now();
    const drawn = () => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - began)));
    const all = { childList: true, characterData: true, subtree: true };
    new MutationObserver(drawn).observe(box.querySelector(".count"), all);
    input.value = "Kyoto 12";
    input.dispatchEvent(new Event("input"));
})"""
EMPTY = "<!DOCTYPE html><title>empty</title><p>empty"


def find_browser() -> str | None:
    """Returns the path of an installed Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def write_page(path: Path, edits: int) -> dict[str, Any]:
    """Writes a report and returns its size."""
    contents = collect(make_contents(edits), "edits")
    report = replace(contents, measured=True, gates=make_gates(), others=others(edits // 2))
    path.write_text(render(report), encoding="utf-8")
    return {"edits": edits, "others": edits // 2, "bytes": path.stat().st_size}


def measure(browser: Any, address: str, width: int, repeats: int) -> dict[str, Any]:
    """Opens a page several times and returns the seconds; fails if anything else is loaded or an error is logged."""
    opened, busy, searched, unwanted = list[float](), list[float](), list[float](), list[str]()
    for _ in range(repeats):
        context = browser.new_context(viewport={"width": width, "height": HEIGHT})
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("request", lambda request: unwanted.append(request.url) if request.url != address else None)
        page.on("pageerror", lambda error: unwanted.append(str(error)))
        session = context.new_cdp_session(page)
        session.send("Performance.enable")
        began = time.perf_counter()
        page.goto(address)
        page.evaluate(DRAWN)
        opened.append(time.perf_counter() - began)
        metrics = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
        busy.append(metrics["ProcessTime"])
        if page.locator("#edits input").count():
            searched.append(page.evaluate(SEARCH) / 1000)
        context.close()
    if unwanted:
        raise SystemExit(f"the page loaded or logged {unwanted[0]}")
    found = {"width": width, "seconds_opened": summary(opened), "seconds_processor": summary(busy)}
    return found | ({"seconds_searched": summary(searched)} if searched else {})


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Returns minimum, median and maximum."""
    return {"min": round(min(seconds), 3), "median": round(median(seconds), 3), "max": round(max(seconds), 3)}


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--widths", type=int, nargs="+", default=[390, 1280])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--note", default="", help="remark for the result file, such as what else ran")
    add_json(parser)
    options = parser.parse_args()
    program = find_browser()
    if program is None:
        raise SystemExit(f"no browser found; install one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        version, pages = browser.version, list[dict[str, Any]]()
        for edits in (0, *options.edits):
            path = Path(folder) / f"{edits}.html"
            if edits:
                about = write_page(path, edits)
            else:
                path.write_text(EMPTY)
                about = {"edits": 0, "others": 0, "bytes": len(EMPTY)}
            found = [measure(browser, path.as_uri(), width, options.repeats) for width in options.widths]
            pages.append(about | {"opened": found})
            print(json.dumps(pages[-1]), file=sys.stderr, flush=True)
        browser.close()
    shown = {"chromium": version, "repeats": options.repeats, "note": options.note}
    record(options.json, "opening of change reports", **shown, pages=pages)


if __name__ == "__main__":
    main()
