"""Where streams run: the shipped model and its world, or a model of the user's with a data set."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

from rlsedit_fast.editing import Editor
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case, edited_twice, related_cases, world_cases
from rlsedit_fast.evaluation.consistency import likeness, reference_texts
from rlsedit_fast.evaluation.datasets import counterfact_cases, zsre_cases
from rlsedit_fast.evaluation.demo import CONFIG, anchor_texts
from rlsedit_fast.evaluation.mquake import mquake_cases
from rlsedit_fast.evaluation.stream import Ground
from rlsedit_fast.evaluation.tasks import TASKS, Item, read_task
from rlsedit_fast.models.loading import load_model
from rlsedit_fast.statistics import KeyStatistics
from rlsedit_fast.statistics.sources import GivenTexts
from rlsedit_fast.world import World, load_demo_model
from rlsedit_fast.world.facts import shuffled

DEMO = "demo"
"""The name of the shipped model, in place of a path."""

Kind = Literal["plain", "conflicting", "related"]
"""Streams: different subjects; each fact edited twice with different targets; all the facts of a few subjects."""

PROBE_SEED = 20_262
"""Of the demo's running text."""

_PROBED = 300
"""Sentences of it that are probed."""


@dataclass(frozen=True, kw_only=True)
class GroundSpec:
    """A ground by what it is made of, so that another process can make it too.

    Attributes:
        model: `demo`, or what transformers' `from_pretrained` takes.
        data: file of CounterFact, zsRE or MQuAKE (distinguished by its fields), for any model but the demo's.
        text: file of running text: the first part is what the model is to go on doing, the rest is probed.
        statistics: key statistics in place of that first part.
        tokens: of that first part, at most; None goes by the width of the keys, see `Ground`.
        tasks: folder with `NAME.jsonl` of GLUE and MMLU.
        items: of each task, at most.
        device: to load the model onto.
        dtype: to load it in.
        among: only the first so many records of `data`.
        references: file of texts about subjects, by relation and answer, in the form of ROME's
            `attribute_snippets.json`; for CounterFact in its original form, whose consistency is then measured.
    """

    model: str = DEMO
    data: str | None = None
    text: str | None = None
    statistics: str | None = None
    tokens: int | None = None
    tasks: str | None = None
    items: int = 500
    device: str = "cpu"
    dtype: str = "float32"
    among: int | None = None
    references: str | None = None

    @property
    def name(self) -> str:
        """In results, without the place where it lies."""
        return DEMO if self.model == DEMO else Path(self.model).name

    @property
    def made_of(self) -> dict[str, Any]:
        """What is not as usual, beside the device, in results; files without the place where they lie, by name and
        digest, a model's by a digest of samples of its files.
        """
        usual, files = GroundSpec(), {"model", "data", "text", "statistics", "tasks", "references"}
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "device"}
        found = {
            name: _named(Path(value)) if name in files else value
            for name, value in given.items()
            if value != getattr(usual, name)
        }
        return found | ({"probed": "what is about nobody who is edited"} if self.model == DEMO else {})


_SAMPLE = 65_536
"""Bytes read at a file's beginning, middle and end that distinguish it from another one."""


def _named(path: Path) -> str:
    """A file's or a folder's name, and a digest of samples of its content; of what is not there the name."""
    inside = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for one in inside:
            size = one.stat().st_size
            digest.update(f"{one.name if path.is_dir() else ''} {size} ".encode())
            with one.open("rb") as file:
                for at in (0, size // 2, max(0, size - _SAMPLE)):
                    file.seek(at)
                    digest.update(file.read(_SAMPLE))
    except OSError:
        return path.name
    return f"{path.name} {digest.hexdigest()[:12]}"


@lru_cache(maxsize=1)
def _world() -> World:
    return World.generate()


def make_ground(spec: GroundSpec) -> Ground:
    """The ground of a specification.

    Raises:
        InputError: files that are missing or cannot be read, or references without scikit-learn.
    """
    tasks = _tasks(spec)
    alike = None if spec.references is None else likeness(Path(spec.references))
    if spec.model == DEMO:
        return Ground(spec.name, load_demo_model, _demo_statistics, _demo_texts, tasks, alike, made_of=spec.made_of)
    if spec.text is None:
        raise InputError("text: name a file of running text; perplexity and KL are measured on it")
    load = partial(load_model, spec.model, dtype=spec.dtype, device=spec.device)
    lines = running_text(Path(spec.text))
    cut = len(lines) * 3 // 4
    held: Any = lines[:cut] if spec.statistics is None else KeyStatistics.load(Path(spec.statistics))
    probed = list(lines[cut:])
    random.Random(PROBE_SEED).shuffle(probed)
    return Ground(spec.name, load, lambda _seed: held, lambda *_: probed, tasks, alike, spec.tokens, spec.made_of)


@lru_cache(maxsize=4)
def _demo_statistics(seed: int) -> KeyStatistics:
    """Of a seed's anchor texts, for all layers; collected once for all runs of the seed."""
    model, tokenizer = load_demo_model()
    every = CONFIG.replace(layers=tuple(range(model.config.num_hidden_layers)))
    return Editor(model, tokenizer, config=every).statistics(GivenTexts(anchor_texts(_world(), seed)))


def _demo_texts(seed: int, subjects: Collection[str]) -> list[str]:
    """Sentences that are none of a seed's anchors, those about other people than the subjects first."""
    held = set(anchor_texts(_world(), seed))
    others = [text for text in dict.fromkeys(anchor_texts(_world(), PROBE_SEED)) if text not in held]
    return sorted(others, key=lambda text: any(subject in text for subject in subjects))[:_PROBED]


def make_cases(spec: GroundSpec, kind: str, edits: int, seed: int, order: int = 0) -> tuple[list[Case], list[Case]]:
    """The cases of a stream in the order in which they are edited, and those of them that later ones supersede.

    Of the demo's cases fewer prompts are asked than in the demonstration: two paraphrases, two neighbours, a namesake
    and two other facts, since there are many streams.

    Raises:
        InputError: no such stream, fewer cases than edits, or references that go with none of the cases.
    """
    if kind not in get_args(Kind):
        raise InputError(f"stream={kind!r}: expected one of {', '.join(get_args(Kind))}")
    layout = None if spec.model == DEMO or spec.data is None else layout_of(Path(spec.data))
    if spec.references is not None and layout != "counterfact":
        raise InputError(
            f"references: {spec.name if layout is None else spec.data} has no generation prompts and no ids of "
            "relations and answers to go with them; give CounterFact in its original form as data, or no references"
        )
    superseded: list[Case] = []
    if spec.model == DEMO:
        if kind == "related":
            cases = [_trimmed(case) for case in related_cases(_world(), edits, seed)]
        elif kind == "conflicting":
            if edits % 2:
                raise InputError(f"edits={edits}: a conflicting stream edits every fact twice; take an even number")
            superseded = [_trimmed(case) for case in world_cases(_world(), edits // 2, seed)]
            cases = superseded + edited_twice(superseded, seed)
        else:
            cases = [_trimmed(case) for case in world_cases(_world(), edits, seed)]
    elif kind != "plain":
        raise InputError(f"stream={kind!r}: only the demo's world has it; take plain")
    elif spec.data is None:
        raise InputError("data: name a file of CounterFact, zsRE or MQuAKE")
    else:
        path = Path(spec.data)
        if layout == "mquake":
            return mquake_cases(path, edits, seed=seed, order=order, among=spec.among), []
        if layout == "zsre":
            cases = zsre_cases(path, edits, seed=seed)
        else:
            texts = None if spec.references is None else reference_texts(Path(spec.references))
            cases = counterfact_cases(path, edits, seed=seed, among=spec.among, references=texts)
    if order:
        if superseded:
            raise InputError("order: a stream in which edits replace earlier ones has one order; take 0")
        cases = shuffled(cases, random.Random(f"{seed}-{order}"))
    return cases, superseded


def _trimmed(case: Case) -> Case:
    return replace(
        case,
        paraphrases=case.paraphrases[:2],
        neighbors=case.neighbors[:2],
        namesakes=case.namesakes[:1],
        same_subject=case.same_subject[:2],
    )


def layout_of(path: Path) -> Literal["counterfact", "zsre", "mquake"]:
    """Which data set a file is of, by the fields of its first record.

    Raises:
        InputError: a file that cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            head = file.read(4000)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if re.search(r'"requested_rewrite"\s*:\s*\[', head):
        return "mquake"
    return "zsre" if '"src"' in head else "counterfact"


def running_text(path: Path) -> list[str]:
    """The lines of a text file that have at least eight words.

    Raises:
        InputError: the file cannot be read, is JSON Lines, or has fewer than eight such lines.
    """
    if path.suffix == ".jsonl":
        raise InputError(
            f"{path}: expected running text, a paragraph a line, not JSON Lines; write its texts into a file"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    found = [line for line in lines if len(line.split()) >= 8]  # no headings
    if len(found) < 8:
        raise InputError(f"{path}: {len(found)} lines of eight words or more; give more text")
    return found


def _tasks(spec: GroundSpec) -> dict[str, list[Item]]:
    if spec.tasks is None:
        return {}
    there = {name: Path(spec.tasks) / f"{name}.jsonl" for name in TASKS}
    found = {name: read_task(name, path, items=spec.items) for name, path in there.items() if path.exists()}
    if not found:
        raise InputError(f"{spec.tasks}: none of {', '.join(path.name for path in there.values())} is there")
    return found
