"""`rlsedit deploy`: load an adapter or a checkpoint into a running inference server."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from rlsedit_fast.cli import DONE, PARTIAL
from rlsedit_fast.cli.facts import add_facts, facts_given, read_facts
from rlsedit_fast.cli.output import add_json, emit, say
from rlsedit_fast.errors import InputError
from rlsedit_fast.serving import VLLM, SGLang, count_stated
from rlsedit_fast.serving.http import Server

HELP = "load an adapter or an edited checkpoint into a running vLLM or SGLang server"
ABOUT = (
    "Load edits into a running vLLM or SGLang server without a restart: a LoRA adapter, which is served beside the "
    "base model under a name of its own, or an edited checkpoint, whose weights replace those of the served model. "
    "With --edits, ask the server the prompts of the edits and count the targets that it states."
)
USAGE = "[--url URL] (--adapter DIR --name NAME | --checkpoint DIR | --unload NAME | --edits FILE) [options]"

SERVERS: dict[str, type[VLLM] | type[SGLang]] = {"vllm": VLLM, "sglang": SGLang}


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    server = parser.add_argument_group("server")
    server.add_argument("--engine", choices=tuple(SERVERS), default="vllm", help="program of the server (default vllm)")
    server.add_argument(
        "--url",
        help="address of the server (default: http://localhost:8000 for vllm, http://localhost:30000 for sglang)",
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help="key of the server (default: VLLM_API_KEY or SGLANG_API_KEY of the environment)",
    )
    server.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds to wait for an answer (default 600)"
    )
    action = parser.add_argument_group("what to load (DIR: on this machine, or an absolute path on the server's)")
    action.add_argument("--adapter", metavar="DIR", help="LoRA adapter to load, written with --for vllm")
    action.add_argument(
        "--name",
        dest="served",
        metavar="NAME",
        help="name under which the adapter is served; with --edits alone, the model to ask (default: the base model)",
    )
    action.add_argument("--overwrite", action="store_true", help="replace a loaded adapter of this name")
    action.add_argument("--checkpoint", metavar="DIR", help="edited checkpoint whose weights replace the served ones")
    action.add_argument("--unload", metavar="NAME", help="name of an adapter to unload")
    add_facts(parser, required=False)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
    _check(options)
    facts = read_facts(options) if facts_given(options) else None
    server = make_server(options)
    results: dict[str, Any] = {"url": server.url, "engine": options.engine}
    lines: list[str] = []
    if options.unload is not None:
        server.unload_adapter(options.unload)
        lines.append(f"{server.url} no longer serves {options.unload}")
    if options.adapter is not None:
        server.load_adapter(options.served, options.adapter, replace=options.overwrite)
        lines.append(f"{server.url} serves the adapter {options.adapter} as {options.served}")
    if options.checkpoint is not None:
        server.reload_weights(options.checkpoint)
        lines.append(f"{server.url} serves the weights of {options.checkpoint}")
    results["models"] = list(server.models())
    lines.append(f"models: {', '.join(results['models'])}")
    if facts is None:
        emit(results, lines, options.json)
        return DONE
    report = count_stated(server, facts.edits, model=options.served)
    results |= {"stated": report.stated, "asked": report.asked, "left_out": facts.left_out}
    results["unstated"] = [
        {"place": facts.places[at], "target": facts.edits[at].target, "answer": report.answers[at]}
        for at in report.unstated
    ]
    lines.append(f"{report.stated} of {report.asked} targets are stated by {options.served or results['models'][0]}")
    lines += [f"  {one['place']}: {one['target']!r}, answer {one['answer']!r}" for one in results["unstated"]]
    emit(results, lines, options.json)
    return PARTIAL if report.unstated or facts.left_out else DONE


def make_server(options: argparse.Namespace) -> Server:
    """Returns the server that the options select."""
    key = options.api_key or os.environ.get(f"{options.engine.upper()}_API_KEY")
    address = {} if options.url is None else {"url": options.url}
    return SERVERS[options.engine](**address, api_key=key, timeout=options.timeout)


def _check(options: argparse.Namespace) -> None:
    """Raises InputError if the options do not name exactly one action, or contradict each other."""
    chosen = [name for name in ("adapter", "checkpoint", "unload") if getattr(options, name) is not None]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(f'--{name}' for name in chosen)} exclude each other; pass one of them")
    if not chosen and options.edits is None:
        raise InputError(
            "nothing to do; pass --adapter DIR --name NAME, --checkpoint DIR, --unload NAME, or --edits FILE to ask "
            "the prompts of edits"
        )
    if options.adapter is not None and not options.served:
        raise InputError("--adapter requires --name NAME, the name under which the adapter is served; add it")
    if options.overwrite and options.adapter is None:
        raise InputError("--overwrite requires --adapter DIR; add it or omit --overwrite")
    if options.served and options.checkpoint is not None:
        raise InputError("--name cannot be combined with --checkpoint: the served model keeps its name; omit it")
    if options.unload is not None and options.edits is not None:
        raise InputError("--edits cannot be combined with --unload; ask the server in a second command")
    for path in (options.adapter, options.checkpoint):
        if path is not None and Path(path).is_absolute() and not Path(path).exists():
            say(f"{path} does not exist here: it is taken as a path on the machine of the server")
