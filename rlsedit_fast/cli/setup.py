"""Options that several commands share: which model, which settings, which anchors."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rlsedit_fast.cli.output import progress, say
from rlsedit_fast.editing import EditConfig, Editor, KeyStatistics, preset
from rlsedit_fast.editing.cache import find
from rlsedit_fast.editing.config import Values
from rlsedit_fast.editing.presets import GENERIC, PRESETS, recognise
from rlsedit_fast.editing.recovery import given_settings
from rlsedit_fast.editing.sources import SelfGenerated, Source, TextFile
from rlsedit_fast.errors import InputError
from rlsedit_fast.models import loading
from rlsedit_fast.models.tokens import FactToken
from rlsedit_fast.rules import RULES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TOKENS = 100_000
"""Of text for the key statistics: several times the widest key of today's models."""

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model(parser: argparse.ArgumentParser, *, name: str = "--model", required: bool = True) -> None:
    """Options that say which model, and how it is loaded."""
    group = parser.add_argument_group("model")
    group.add_argument(name, required=required, help="a folder or a name, as transformers' from_pretrained takes it")
    group.add_argument("--dtype", choices=_DTYPES, default="auto", help="to load it in (default: the checkpoint's own)")
    group.add_argument(
        "--device", help="device to load it onto, such as cuda; or auto, to spread it over all (accelerate)"
    )
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def add_choice(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Options that say which projections are edited, all that a command needs which edits none."""
    group = parser.add_argument_group("settings (those not given are EditConfig's defaults)")
    group.add_argument(
        "--preset",
        choices=("auto", GENERIC, *PRESETS),
        default="auto",
        help="auto: the layers published for a model of this shape where there are any, else by depth; generic: by "
        "depth; a name: all the settings published for that model but its context prefixes",
    )
    group.add_argument("--config", type=Path, metavar="FILE", help="a JSON object of EditConfig's fields")
    group.add_argument(
        "--layers", metavar="L,L,...", help="blocks whose MLP output projections are edited: 4,5,6 or 4-8"
    )
    return group


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Options that make an `EditConfig`."""
    group = add_choice(parser)
    group.add_argument("--batch-size", type=int, help="edits written at once")
    group.add_argument("--adherence", type=float, help="share of each edit to realise, such as 0.95")
    group.add_argument("--lam", type=float, help="how firmly the weight is held; wins over --adherence")
    group.add_argument("--mu", type=float, help="how firmly the anchors are held; wins over --adherence")
    group.add_argument(
        "--rule", choices=RULES, help="what a batch is written by (its own settings: rule_options in --config)"
    )
    group.add_argument("--fact-token", choices=get_args(FactToken), help="the token at which the model is edited")
    group.add_argument(
        "--values",
        choices=get_args(Values),
        help="search: until the target is said; gradient: one step, far faster and far less often enough",
    )
    group.add_argument(
        "--search-ahead", type=int, metavar="N", help="edits whose values are searched at once, where more than a batch"
    )


def add_anchors(parser: argparse.ArgumentParser) -> None:
    """Options that say what the model is to go on doing."""
    group = parser.add_argument_group("anchors (by default the statistics that were collected for this model, if any)")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--statistics", type=Path, metavar="FILE", help="written by `rlsedit statistics --out`")
    which.add_argument(
        "--text", type=Path, metavar="FILE", help="running text that matters: plain, or JSON Lines (text)"
    )
    which.add_argument("--self-generate", action="store_true", help="text that the model itself writes")
    which.add_argument("--no-anchors", action="store_true", help="hold nothing but the weights themselves")
    add_tokens(group)


def add_tokens(parser: argparse._ActionsContainer) -> None:
    """How much text to read, and the seed of what the model writes itself; see `settle_text`."""
    parser.add_argument("--tokens", type=int, help=f"tokens of text to read (default {DEFAULT_TOKENS})")
    parser.add_argument("--seed", type=int, help="of self-generated text (default 0)")


def settle_text(options: argparse.Namespace) -> None:
    """Puts in what is not given of `add_tokens`.

    Raises:
        InputError: one is given, and no text that it is about.
    """
    if options.tokens is not None and options.text is None and not options.self_generate:
        raise InputError("--tokens is how much of a text to read; name one with --text or --self-generate")
    if options.seed is not None and not options.self_generate:
        raise InputError("--seed is of the text that the model writes itself; add --self-generate, or leave it out")
    options.tokens = DEFAULT_TOKENS if options.tokens is None else options.tokens
    options.seed = 0 if options.seed is None else options.seed


def at_least_one(text: str) -> int:
    """How many of something, for argparse.

    Raises:
        argparse.ArgumentTypeError: it is no whole number, or below 1.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, at least 1")
    return int(text)


def load_model(options: argparse.Namespace, path: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that the options name, or another one in its place; see `models.loading`."""
    return loading.load_model(
        options.model if path is None else path,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )


def settings_given(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `EditConfig` that the options say.

    Raises:
        InputError: a setting that does not exist or cannot be meant.
    """
    changes: dict[str, Any] = _read_config(options.config) if options.config else {}
    for name in ("batch_size", "adherence", "lam", "mu", "rule", "fact_token", "values", "search_ahead"):
        if (value := getattr(options, name, None)) is not None:
            changes[name] = value
    if options.layers is not None:
        changes["layers"] = _layers(options.layers)
    return changes


def make_config(options: argparse.Namespace, stored: EditConfig | None = None) -> EditConfig:
    """The settings that the options say; where a store has some, those, with what the options change.

    Raises:
        InputError: a setting that does not exist or cannot be meant.
    """
    changes = settings_given(options)
    if stored is not None:
        if options.preset != "auto":
            raise InputError(
                f"--preset {options.preset}: the store has settings, which hold for all of its edits; leave it out, or "
                "make another store"
            )
        return replace(stored, **changes)
    if options.preset == "auto":
        return EditConfig(**changes)
    return preset(options.preset, **changes)


def make_editor(options: argparse.Namespace) -> Editor:
    """Settings first, since loading takes long; then the model, and an editor of it, with a store if one is named."""
    place = getattr(options, "store", None)
    stored = given_settings(place) if place is not None else None
    config = make_config(options, stored)
    model, tokenizer = load_model(options)
    if options.preset == GENERIC and config.layers is None and recognise(model.config) is not None:
        config = replace(config, layers=config.layers_of(model.config.get_text_config().num_hidden_layers))
    return Editor(model, tokenizer, config=config, store=place)


def anchor(editor: Editor, options: argparse.Namespace) -> str:
    """Gives the editor the anchors that the options name; says which they are.

    Raises:
        InputError: the statistics are of another model, or the text cannot be read.
    """
    if options.no_anchors:
        return "none"
    if options.statistics is not None:
        found: KeyStatistics | None = KeyStatistics.load(options.statistics)
    elif options.text is not None or options.self_generate:
        found = gather(editor, make_source(editor, options), options.tokens)
    else:
        found = find(editor.fingerprint(), editor.layers)
        if found is None:
            say(
                "no anchors: nothing but the weights themselves is held. Collect what the model is to go on doing with "
                "`rlsedit statistics`, or name --text FILE or --self-generate"
            )
            return "none"
    assert found is not None
    tokens = editor.anchor(found)
    return f"{tokens} tokens: {found.source}"


def make_source(editor: Editor, options: argparse.Namespace) -> Source:
    """The text that the options name."""
    return SelfGenerated(editor.model, seed=options.seed) if options.self_generate else TextFile(options.text)


def gather(editor: Editor, source: Source, tokens: int, checkpoint: Path | None = None) -> KeyStatistics:
    """Collects key statistics behind a progress bar."""
    with progress(tokens, "key statistics", "token") as bar:
        return editor.statistics(
            source, tokens=tokens, progress=lambda done, _of: bar.update(done - bar.n), checkpoint=checkpoint
        )


def show_warnings() -> None:
    """What the package has to say goes to stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config {path}: cannot be read as JSON ({error})") from error
    known = {field.name for field in fields(EditConfig)}
    if not isinstance(given, dict) or (unknown := sorted(set(given) - known)):
        raise InputError(
            f"--config {path}: expected a JSON object of EditConfig's fields"
            + (f", these are none: {', '.join(unknown)}" if isinstance(given, dict) else "")
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _layers(text: str) -> tuple[int, ...]:
    try:
        layers: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
        return tuple(layers)
    except ValueError as error:
        raise InputError(f"--layers {text}: expected block indices, such as 4,5,6 or 4-8") from error
