"""`rlsedit ask`: answers of a model before and after its edits, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsedit_fast.cli import DONE, setup
from rlsedit_fast.cli.output import add_json, emit, plain
from rlsedit_fast.cli.stores import check_source, open_model
from rlsedit_fast.editing import Editor
from rlsedit_fast.editing.storage.recovery import read_history
from rlsedit_fast.errors import InputError
from rlsedit_fast.models.answers import chat_answers, generate_answers, supports_chat
from rlsedit_fast.models.tokens import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "ask a model questions; with a store or an edited checkpoint, before and after the edits"

USAGE = "(--store DIR [--edit ID ...] | --model MODEL [--edited MODEL]) [--chat] [QUESTION ...] [options]"
TOKENS = 32


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help="question, or text that the model continues")
    parser.add_argument("--store", type=Path, metavar="DIR", help="store of edits of the model")
    parser.add_argument(
        "--edit",
        nargs="+",
        default=[],
        metavar="ID",
        help="with --store: ask the prompts of edits, given by id or name",
    )
    parser.add_argument("--edited", metavar="MODEL", help="instead of --store: edited checkpoint; --model is its base")
    parser.add_argument(
        "--chat", action="store_true", help="ask in a chat, with the chat template of the model (default: continue)"
    )
    parser.add_argument(
        "--answer-tokens",
        type=setup.at_least_one,
        default=TOKENS,
        metavar="N",
        help=f"maximum number of tokens of an answer (default {TOKENS})",
    )
    setup.add_model(parser, required=False)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    setup.show_warnings()
    check_source(options)
    if options.edit and options.store is None:
        raise InputError("--edit requires --store DIR, the store of the edits; add it")
    if options.edit:
        options.questions += _prompts(options)
    if not options.questions:
        raise InputError("no question given; pass text, or --store DIR --edit ID")
    if blank := [question for question in options.questions if not question.strip()]:
        raise InputError(f"{blank[0]!r} is not a question; pass text")
    columns = dict[str, list[str]]()
    if options.store is not None:
        model, tokenizer = open_model(options)
        columns["base"] = _answers(model, tokenizer, options)
        with Editor(model, tokenizer, store=options.store) as editor:
            columns["edited"] = _answers(editor.model, tokenizer, options)
    else:
        paths = {"base": options.model} | ({"edited": options.edited} if options.edited is not None else {})
        configs = {name: setup.check_model(options, path=path) for name, path in paths.items()}
        for name, path in paths.items():
            columns[name] = _answers(*setup.load_model(options, path, config=configs[name]), options)
    rows: list[dict[str, Any]] = [
        {"question": question} | {name: answers[at] for name, answers in columns.items()}
        for at, question in enumerate(options.questions)
    ]
    lines: list[str] = []
    for row in rows:
        lines.append(plain(row["question"]))
        lines += [f"  {name:7} {_one_line(row[name])}" for name in columns]
    emit(rows, lines, options.json)
    return DONE


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> list[str]:
    if not options.chat:
        asked = [(question, "") for question in options.questions]
        return generate_answers(model, tokenizer, asked, tokens=options.answer_tokens)
    if not supports_chat(tokenizer):
        raise InputError("--chat: the tokenizer of the model has no chat template; omit --chat")
    return chat_answers(model, tokenizer, options.questions, tokens=options.answer_tokens)


def _prompts(options: argparse.Namespace) -> list[str]:
    """Returns the prompts of the edits that --edit selects, in any state."""
    records = read_history(options.store)
    prompts: list[str] = []
    for text in options.edit:
        found = [one for one in records if (one.id == int(text) if text.isdecimal() else one.name == text)]
        if not found:
            raise InputError(
                f"--edit {text}: the store has no edit with this id or name; list them with `rlsedit history --store "
                f"{options.store}`"
            )
        prompts += [fill(one.prompt, one.subject)[0] for one in found]
    return prompts


def _one_line(text: str) -> str:
    return plain(" ".join(text.split()))
