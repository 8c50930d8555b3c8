"""What the package's errors advise, in the words of whoever is at a terminal: options in the place of arguments."""

from __future__ import annotations

OPTIONS = {
    "pass strict=False to leave": "pass --skip-bad to leave",
    "conflicts='later'": "--conflicts later",
    "see history()": "see `rlsedit history`",
    "Leave config out to go on": "Leave out --config and the options of settings to go on",
    "name them with Editor.anchor(texts)": "name them with --text, --statistics or --self-generate",
    "make one with Editor(..., store=DIR)": "make one with `rlsedit edit --store DIR`",
    "EditConfig(layer_module=..., projection_module=...)": "layer_module and projection_module in --config",
    "EditConfig(layer_module=...)": "layer_module in --config",
    "EditConfig(projection_module=...)": "projection_module in --config",
}
"""By what Python's caller is told."""


def spoken(error: Exception) -> str:
    """An error's text for a terminal."""
    text = str(error)
    for python, option in OPTIONS.items():
        text = text.replace(python, option)
    return text
