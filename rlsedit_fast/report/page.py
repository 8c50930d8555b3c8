"""Renders a change report as one HTML file without scripts, fonts or styles from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from rlsedit_fast.errors import InputError
from rlsedit_fast.report.charts import change_chart, layer_chart, retention_chart
from rlsedit_fast.report.collect import ChangeReport, counts_of

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_TEMPLATE = "page.html.jinja"
_ROWS = 100  # rows of a table that are shown at first, as in page.js
_LONG = 400  # characters of a text that are shown at once
_JOINERS = {0x200C, 0x200D}  # part of emoji and of words in some scripts
_MISSING = 'the report requires jinja2 and matplotlib; run `pip install "rlsedit-fast[report]"`'


def check_installed() -> None:
    """Raises InputError if a package that the report requires is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(f"{_MISSING} ({error})") from error


def render(report: ChangeReport, title: str | None = None) -> str:
    """Returns the page of a report.

    Args:
        report: the report.
        title: its title; by default the name of the model.

    Raises:
        InputError: a package is not installed.
    """
    check_installed()
    environment = _environment()
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    status = report.status
    charts = {
        "retention": retention_chart(report.ages),
        "change": change_chart(report.changes, status.budget, status.edits_left),
        "layers": layer_chart(status.layers),
    }
    from markupsafe import Markup

    page = environment.get_template(_TEMPLATE).render(
        report=report,
        status=status,
        title=title or report.model.rstrip("/").rsplit("/", 1)[-1],
        counts=counts_of(report.others),
        others=sorted(report.others, key=lambda row: not row.moved),
        charts={name: Markup(svg) for name, svg in charts.items()},  # drawn from numbers
        style=Markup(_resource("page.css")),
        script=Markup(script),
        digest=digest,
        shown_rows=_ROWS,
        has_chat=any(row.chat_now is not None for row in report.edits),
    )
    return page.lstrip()


def _environment() -> Environment:
    from jinja2 import DictLoader, Environment, StrictUndefined

    environment = Environment(
        loader=DictLoader({_TEMPLATE: _resource(_TEMPLATE)}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "share": share, "number": number}
    return environment


def _resource(name: str) -> str:
    return (files("rlsedit_fast.report") / name).read_text(encoding="utf-8")


def shown(text: str) -> Markup:
    """Returns text as HTML that shows all of it: invisible characters by their code, and long text on request."""
    from markupsafe import Markup

    if len(text) <= _LONG:
        return Markup("<bdi>{}</bdi>").format(_visible(text))
    return Markup("<details><summary><bdi>{}</bdi>… ({} characters)</summary><bdi>{}</bdi></details>").format(
        _visible(text[: _LONG // 2]), f"{len(text):,}", _visible(text)
    )


def _visible(text: str) -> Markup:
    """Escapes text, and replaces control, invisible and bidirectional characters by their code."""
    from markupsafe import Markup, escape

    if text.isprintable():
        return escape(text)
    parts, plain, before = list[Any](), list[str](), ""
    for character in text:
        if character.isprintable() or character == "\n" or (ord(character) in _JOINERS and not before.isascii()):
            plain.append(character)
        else:
            parts += [escape("".join(plain)), Markup('<span class="code">U+{:04X}</span>').format(ord(character))]
            plain = []
        before = character
    return Markup("").join([*parts, escape("".join(plain))])


def share(count: int, of: int) -> str:
    """Returns a share in percent that is 100 % and 0 % only if it is exact."""
    if not of:
        return "–"
    percent = 100 * count / of
    if 0 < count < of:
        percent = min(max(percent, 0.1), 99.9)
    return f"{percent:.3g} %"


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number, or a dash if there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"
