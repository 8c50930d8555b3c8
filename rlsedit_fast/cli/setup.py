"""Options shared by several commands: model, settings, anchors."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from rlsedit_fast.baselines import BASELINES, RECURSIVE
from rlsedit_fast.cli.launch import add_processes
from rlsedit_fast.cli.output import is_quiet, progress, say
from rlsedit_fast.editing import EditConfig, Editor
from rlsedit_fast.editing.config import OnOverlap, load_settings
from rlsedit_fast.editing.presets import GENERIC, PRESETS, find_preset
from rlsedit_fast.editing.storage.persistence import check_store
from rlsedit_fast.editing.storage.recovery import read_settings
from rlsedit_fast.errors import InputError
from rlsedit_fast.files import open_tensors
from rlsedit_fast.models import loading
from rlsedit_fast.models.tensor_parallel import loading_options
from rlsedit_fast.models.tokens import FactToken
from rlsedit_fast.processes import world
from rlsedit_fast.statistics import KeyStatistics, SelfGenerated, Source, TextFile
from rlsedit_fast.statistics.collection import HELD_OUT
from rlsedit_fast.statistics.key_statistics import EARLIER_STATISTICS, STATISTICS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TOKENS = 100_000
"""Tokens for the key statistics; several times the key dimension of current models."""

_OPTIONS: dict[str, tuple[str | None, str]] = {
    "batch_size": (None, "batch_size"),
    "rule": (None, "rule"),
    "fact_token": (None, "fact_token"),
    "adherence": ("prior", "adherence"),
    "lam": ("prior", "lam"),
    "mu": ("prior", "mu"),
    "search_ahead": ("search", "ahead"),
    "overlap": (None, "overlap"),
    "chat": (None, "measure_chat"),
}
"""Options of `add_settings`, and the group and the name of the setting of `EditConfig`."""


def add_model(parser: argparse.ArgumentParser, *, required: bool = True, divided: bool = False) -> None:
    """Adds the options that select the model and how to load it; `divided`: also --tp and --dp."""
    default = "" if required else " (default: the model recorded in the store)"
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=required, help=f"local folder, GGUF file, or Hugging Face Hub name of the model{default}"
    )
    group.add_argument(
        "--dtype",
        type=dtype,
        default="auto",
        metavar="DTYPE",
        help="dtype to load the model in: float32, bfloat16, float16, or auto, that of the checkpoint (default auto)",
    )
    group.add_argument(
        "--device",
        help="device to load the model on, such as cuda; auto distributes it over all devices (requires accelerate) "
        "(default: cpu)",
    )
    if divided:
        add_processes(group)
    group.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")


def add_choice(parser: argparse.ArgumentParser, *, generic: bool = True) -> argparse._ArgumentGroup:
    """Adds the options that select the edited layers; `generic` is whether --preset generic is accepted."""
    group = parser.add_argument_group("settings (defaults are those of EditConfig)")
    group.add_argument(
        "--preset",
        choices=("auto", *[GENERIC] * generic, *PRESETS),
        default="auto",
        metavar="NAME",
        help="auto (default): the layers published for this model architecture, or else layers chosen by depth; "
        f"{'generic: always layers chosen by depth; ' * generic}{', '.join(PRESETS)}: all settings published for that "
        "model, except its context prefixes",
    )
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help='JSON file with settings of EditConfig, such as {"batch_size": 10, "prior": {"adherence": 0.9}}; the '
        "options below take precedence",
    )
    group.add_argument(
        "--layers", metavar="L,L,...", help="decoder layers whose MLP output projections are edited: 4,5,6 or 4-8"
    )
    return group


def add_settings(parser: argparse.ArgumentParser, *, rule: bool = True) -> None:
    """Adds the options that set fields of `EditConfig`; `rule` is False for a command that rejects --rule."""
    group = add_choice(parser, generic=rule)
    group.add_argument(
        "--batch-size", type=at_least_one, metavar="N", help="edits that are written at once (default 100)"
    )
    group.add_argument(
        "--adherence",
        type=float,
        metavar="A",
        help="fraction of the change that an edit needs which is written into the model, between 0 and 1 (default "
        f"{EditConfig().prior.adherence:g}): with more, edits hold more surely and other text changes more. lam and mu "
        "are calibrated to reach it",
    )
    group.add_argument(
        "--lam", type=float, metavar="X", help="penalty on the weight change, instead of the calibrated one"
    )
    group.add_argument(
        "--mu",
        type=float,
        metavar="X",
        help="penalty on changed outputs on the anchors, instead of the calibrated one; 0 for no anchors",
    )
    group.add_argument(
        "--rule",
        metavar="RULE",
        help=argparse.SUPPRESS
        if not rule
        else f"editing method: {RECURSIVE} (default), or one that cannot undo edits: "
        f"{', '.join(BASELINES)}; its settings: rule_options in --config",
    )
    group.add_argument(
        "--fact-token",
        choices=get_args(FactToken),
        help="token at which the model is edited: the last (default) or the first one of the subject, or the last one "
        "of the prompt",
    )
    group.add_argument(
        "--overlap",
        choices=get_args(OnOverlap),
        help="what to do with an edit whose key earlier edits already use, so that it repeats or contradicts one of "
        "them although their texts differ: keep it (default), warn, skip it, or raise an error",
    )
    group.add_argument(
        "--search-ahead",
        type=at_least_one,
        metavar="N",
        help="number of edits whose values are searched at once, before their batches are written one by one (default: "
        "one batch); faster with small batches",
    )


def add_anchors(parser: argparse.ArgumentParser) -> None:
    """Adds the options that select the anchors: key statistics of text whose outputs are preserved."""
    group = parser.add_argument_group(
        "anchors: text on which the outputs of the edited layers are preserved (default: cached statistics of this "
        "model)"
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--statistics", type=Path, metavar="FILE", help="key statistics written by `rlsedit statistics --out`"
    )
    which.add_argument("--text", type=Path, metavar="FILE", help='text file: plain, or JSON Lines with a field "text"')
    which.add_argument("--self-generate", action="store_true", help="text that the model generates")
    which.add_argument("--no-anchors", action="store_true", help="no anchors; only the weight change is penalized")
    add_tokens(group)


def add_tokens(parser: argparse._ActionsContainer) -> None:
    """Adds the options --tokens, --held-out and --seed; `settle_text` sets their defaults."""
    parser.add_argument(
        "--tokens", type=at_least_one, metavar="N", help=f"number of tokens to use (default {DEFAULT_TOKENS})"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        metavar="F",
        help="fraction of the tokens that is not preserved, on which the change is measured; 0 for none (default "
        f"{HELD_OUT})",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="random seed of --self-generate (default 0)")


def settle_text(options: argparse.Namespace) -> None:
    """Sets the defaults of --tokens, --held-out and --seed.

    Raises:
        InputError: one of them is given without the option that it applies to.
    """
    if options.tokens is not None and options.text is None and not options.self_generate:
        raise InputError("--tokens requires --text FILE or --self-generate; add one of them or omit --tokens")
    if options.held_out is not None and options.text is None and not options.self_generate:
        raise InputError("--held-out requires --text FILE or --self-generate; add one of them or omit --held-out")
    if options.held_out is not None and not 0 <= options.held_out < 1:
        raise InputError(f"--held-out {options.held_out:g}: expected a fraction of at least 0 and below 1")
    if options.seed is not None and not options.self_generate:
        raise InputError("--seed requires --self-generate; add it or omit --seed")
    options.tokens = DEFAULT_TOKENS if options.tokens is None else options.tokens
    options.held_out = HELD_OUT if options.held_out is None else options.held_out
    options.seed = 0 if options.seed is None else options.seed


def dtype(text: str) -> str:
    """Parses the name of a dtype for argparse.

    Raises:
        argparse.ArgumentTypeError: the dtype is unknown.
    """
    try:
        loading.check_dtype(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(error.message) from None
    return text


def at_least_one(text: str) -> int:
    """Parses a positive integer for argparse.

    Raises:
        argparse.ArgumentTypeError: the text is not an integer of at least 1.
    """
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return int(text)


def load_model(
    options: argparse.Namespace, path: str | None = None, **loaded: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the model given by the options, or the one at `path`.

    Args:
        options: options added by `add_model`.
        path: the model, if not the one of the options.
        **loaded: `config` and `tokenizer`, if they are loaded already; see `models.loading.load_model`.
    """
    if getattr(options, "tp", None):
        loaded |= loading_options(options.tp)
    device = options.device
    if getattr(options, "dp", None) and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.current_device()}"  # of this process
    return loading.load_model(
        options.model if path is None else path,
        dtype=options.dtype,
        device=device,
        trust_remote_code=options.trust_remote_code,
        **loaded,
    )


def settings_given(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the fields of `EditConfig` that the options set.

    Raises:
        InputError: a setting is unknown or has an invalid value.
    """
    changes = load_settings(options.config, f"--config {options.config}") if options.config else {}
    for option, (group, setting) in _OPTIONS.items():
        if (value := getattr(options, option, None)) is None:
            continue
        _check_option(option, value, {setting: value} if group is None else {group: {setting: value}})
        if group is None:
            changes[setting] = value
        else:
            changes[group] = {**changes.get(group, {}), setting: value}
    if options.layers is not None:
        changes["layers"] = _layers(options.layers)
        _check_option("layers", options.layers, {"layers": changes["layers"]})
    return changes


def _check_option(option: str, value: object, setting: dict[str, Any]) -> None:
    """Raises InputError that names the option, not the setting, if its value is invalid."""
    try:
        EditConfig().replace(**setting)
    except InputError as error:
        expected = error.message.rpartition(": expected ")[2]
        given = f"{value:g}" if isinstance(value, float) else value
        raise InputError(f"--{option.replace('_', '-')} {given}: expected {expected}", error.hint) from None


def make_config(options: argparse.Namespace, stored: EditConfig | None = None) -> EditConfig:
    """Returns the settings: those of the store if there is one, else those of the preset, changed by the options.

    Raises:
        InputError: a setting is unknown or has an invalid value.
    """
    changes = settings_given(options)
    if stored is not None:
        if options.preset != "auto":
            raise InputError(
                f"--preset {options.preset}: the settings of an existing store apply to all of its edits; omit "
                "--preset or create another store"
            )
        return stored.replace(**changes)
    return EditConfig.from_preset(GENERIC if options.preset == "auto" else options.preset, **changes)


def check_model(
    options: argparse.Namespace, config: EditConfig | None = None, path: str | None = None
) -> PretrainedConfig:
    """Checks options that depend on the model against its config, before the weights are loaded, and returns it.

    Args:
        options: options added by `add_model`.
        config: settings of the editor, if there is one.
        path: the model, if not the one of the options.

    Raises:
        InputError: the device, the dtype, the model or a layer does not exist.
        ModelError: the model is not supported.
    """
    loading.check_dtype(options.dtype)
    loading.check_device(options.device)
    found = loading.load_config(path or options.model, trust_remote_code=getattr(options, "trust_remote_code", False))
    text = found.get_text_config()
    depth = getattr(text, "num_hidden_layers", None)
    preset = PRESETS.get(getattr(options, "preset", ""))
    if config is None or depth is None:
        return found
    wrong = [layer for layer in config.layers or () if layer >= depth]
    if preset is not None and preset != find_preset(found):
        about = (
            f"--preset {preset.name} is for {preset.model_type} models with {preset.blocks} layers of width "
            f"{preset.hidden_size}, and {path or options.model} is {text.model_type} with {depth} layers of width "
            f"{text.hidden_size}"
        )
        if wrong and options.layers is None:
            raise InputError(f"{about}; omit --preset to use layers 0 to {depth - 1} by depth, or pass --layers")
        say(f"warning: {about}")
    if wrong:
        where = f"--layers {options.layers}" if options.layers is not None else f"layers={list(config.layers or ())}"
        raise InputError(f"{where}: layers {wrong} do not exist; the model has layers 0 to {depth - 1}")
    return found


def _check_anchors(options: argparse.Namespace, config: EditConfig) -> None:
    """Checks the options of the anchors before the model is loaded.

    Raises:
        InputError: the options contradict each other, or the file of --statistics or --text cannot be used.
    """
    if getattr(options, "no_anchors", False) and config.prior.mu:
        given = f"--mu {options.mu:g}" if options.mu is not None else f"mu={config.prior.mu:g} in the settings"
        raise InputError(
            f"{given} is the weight of the anchors, and --no-anchors omits them; pass anchors (--text, --statistics or "
            "--self-generate), or --mu 0"
        )
    if getattr(options, "text", None) is not None:
        TextFile(options.text).check()
    if getattr(options, "statistics", None) is not None:
        advice = "collect the statistics again"
        with open_tensors(options.statistics, STATISTICS, advice, earlier=EARLIER_STATISTICS) as file:
            held = set(file.about["layers"])
        if missing := sorted({*(config.layers or ())} - held):
            raise InputError(
                f"--statistics {options.statistics} contains the layers {sorted(held)} and lacks {missing}; collect "
                "statistics for all edited layers"
            )


@dataclass(frozen=True)
class EditorPlan:
    """An editor whose settings are checked and whose model is not loaded yet.

    Attributes:
        options: options of the command.
        config: settings of the editor.
        model_config: config of the model.
        tokenizer: tokenizer of the model.
    """

    options: argparse.Namespace
    config: EditConfig
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    def load(self) -> Editor:
        """Loads the model and returns the editor, with a store if one is given."""
        model, tokenizer = load_model(self.options, config=self.model_config, tokenizer=self.tokenizer)
        store, replicas = getattr(self.options, "store", None), world().replicas
        return Editor(model, tokenizer, config=self.config, store=store, data_parallel=replicas)


def plan_editor(options: argparse.Namespace) -> EditorPlan:
    """Checks the settings, and loads the config and the tokenizer of the model."""
    place = getattr(options, "store", None)
    stored = read_settings(place) if place is not None else None
    config = make_config(options, stored)
    _check_anchors(options, config)
    if place is not None:
        world().lead(lambda: check_store(place, config))
    found = check_model(options, config)
    if options.preset == GENERIC and config.layers is None and find_preset(found) is not None:
        config = config.replace(layers=config.layers_for(found.get_text_config().num_hidden_layers))
    tokenizer = loading.load_tokenizer(options.model, trust_remote_code=options.trust_remote_code)
    return EditorPlan(options, config, found, tokenizer)


def anchor(editor: Editor, options: argparse.Namespace) -> str:
    """Sets the anchors of the editor as given by the options and returns their description.

    Raises:
        InputError: the statistics belong to another model, or the text cannot be read.
    """
    if options.no_anchors:
        return "none"
    if options.statistics is not None:
        editor.anchor(KeyStatistics.load(options.statistics))
    elif options.text is not None or options.self_generate:
        editor.anchor(gather(editor, make_source(editor, options), options))
    else:
        editor.anchor()
    return editor.anchors or "none"


def make_source(editor: Editor, options: argparse.Namespace) -> Source:
    """Returns the text source given by the options."""
    return SelfGenerated(editor.model, seed=options.seed) if options.self_generate else TextFile(options.text)


def gather(
    editor: Editor, source: Source, options: argparse.Namespace, checkpoint: Path | None = None
) -> KeyStatistics:
    """Collects key statistics with the options of `add_tokens` and shows a progress bar."""
    with progress(options.tokens, "key statistics", "token") as bar:
        return editor.statistics(
            source,
            tokens=options.tokens,
            held_out=options.held_out,
            progress=lambda done, _of: bar.update(done - bar.n),
            checkpoint=checkpoint,
        )


def show_warnings() -> None:
    """Prints warnings of the package to stderr."""
    logging.basicConfig(level=logging.ERROR if is_quiet() else logging.WARNING, format="%(message)s")


def _layers(text: str) -> tuple[int, ...]:
    try:
        layers: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
        return tuple(layers)
    except ValueError as error:
        raise InputError(f"--layers {text}: expected layer indices such as 4,5,6 or 4-8") from error
