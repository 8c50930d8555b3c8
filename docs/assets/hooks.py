"""MkDocs hooks: formulas become MathML, and links to files outside of `docs/` lead to the repository."""

from __future__ import annotations

import html
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
_DELIMITERS = re.compile(r"^\\[(\[](.*)\\[)\]]$", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s]+)(?=\))")
_UNKNOWN = re.compile(r"<m[a-z]+[^>]*>(?:\\[^<]*|&)</m[a-z]+>")
_SPACING = (
    ("<mo>&#x02016;</mo>", '<mo stretchy="false" lspace="0" rspace="0">&#x02016;</mo>'),  # bars of a norm
    ("<mo>&#x0002F;</mo>", '<mo lspace="0" rspace="0">&#x0002F;</mo>'),
    ("<mo>diag</mo>", "<mi>diag</mi>"),
    ("<mo>tr</mo>", "<mi>tr</mi>"),
    ("<mi>&#x003A3;</mi>", '<mi mathvariant="normal">&#x003A3;</mi>'),  # TeX sets capital Greek letters upright
    ("<mi>&#x00394;</mi>", '<mi mathvariant="normal">&#x00394;</mi>'),
    ("<mi>&#x003A9;</mi>", '<mi mathvariant="normal">&#x003A9;</mi>'),
)
"""Replacements in the output of latex2mathml, for the spacing and shapes of TeX."""


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replaces relative links that leave the folder `docs/` by links to the repository."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def resolved(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        inside = path.startswith("docs/")
        return link[1] if inside else f"{config.repo_url.rstrip('/')}/blob/main/{path}"

    return _LINK.sub(resolved, markdown)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Replaces formulas, as `pymdownx.arithmatex` marks them, by MathML, which browsers render without scripts."""

    def rendered(formula: re.Match[str]) -> str:
        given = html.unescape(formula[2]).strip()
        found = _DELIMITERS.match(given)
        if not found:
            raise ValueError(f"{page.file.src_uri}: formula without delimiters: {given}")
        mathml = convert(found[1].strip(), display="block" if formula[1] == "div" else "inline")
        if _UNKNOWN.search(mathml):
            raise ValueError(f"{page.file.src_uri}: latex2mathml does not support the formula {given}")
        for plain, spaced in _SPACING:
            mathml = mathml.replace(plain, spaced)
        return f'<div class="formula">{mathml}</div>' if formula[1] == "div" else mathml

    return _FORMULA.sub(rendered, content)
