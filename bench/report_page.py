"""Renders a report as a self-contained HTML page and as Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from report_runs import OURS

TEMPLATE = Path(__file__).with_name("report_page.html")


@dataclass(frozen=True)
class Table:
    """A table; numbers are right-aligned, the row of `OURS` is highlighted."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs, tables and charts."""

    title: str
    parts: Sequence[str | Table | tuple[str, str]]  # text; table; (SVG, caption)


def markdown(title: str, sections: Sequence[Section]) -> str:
    made = [f"# {title}", ""]
    for section in sections:
        made += [f"## {section.title}", ""]
        for part in section.parts:
            if isinstance(part, Table):
                made += ["| " + " | ".join(part.head) + " |", "|" + "---|" * len(part.head)]
                made += ["| " + " | ".join(row) + " |" for row in part.rows]
                made += ["", *([part.note, ""] if part.note else [])]
            elif isinstance(part, str):
                made += [part, ""]
    return "\n".join(made)


def page(title: str, sections: Sequence[Section]) -> str:
    body = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        for part in section.parts:
            if isinstance(part, Table):
                body.append(_html_table(part))
            elif isinstance(part, str):
                body.append(f"<p>{_inline(part)}</p>")
            else:
                svg, caption = part
                body.append(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>")
        body.append("</section>")
    frame = TEMPLATE.read_text(encoding="utf-8")
    return frame.replace("{title}", html.escape(title)).replace("{body}", "\n".join(body))


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.head)
    rows = []
    for row in table.rows:
        mark = ' class="mark"' if row[0] == OURS else ""
        rows.append(f"<tr{mark}>" + "".join(map(_cell, row)) + "</tr>")
    note = f'<p class="note">{_inline(table.note)}</p>' if table.note else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>{note}'


def _cell(cell: str) -> str:
    numeric = re.match(r"[–\d\[.-]", cell) is not None
    return f"<td>{html.escape(cell)}</td>" if numeric else f'<td class="text">{html.escape(cell)}</td>'
