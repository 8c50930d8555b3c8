"""Models and data on which streams run: the demo model and its world, or another model with a data set."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

from rlsedit_fast.data.layouts import detect
from rlsedit_fast.editing import Editor
from rlsedit_fast.errors import InputError
from rlsedit_fast.evaluation.cases import Case, edited_twice, related_cases, world_cases
from rlsedit_fast.evaluation.consistency import reference_similarity, reference_texts
from rlsedit_fast.evaluation.datasets import counterfact_cases, read_records, zsre_cases
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
"""Name of the demo model, used in place of a path.

Example:
    >>> from rlsedit_fast.evaluation import DEMO
    >>> DEMO
    'demo'
"""

Kind = Literal["plain", "conflicting", "related"]
"""Kinds of streams: different subjects; each fact edited twice with different targets; all facts of a few subjects."""

PROBE_SEED = 20_262
"""Random seed of the demo model's evaluation text."""

_PROBED = 300
"""Maximum number of sentences of this text."""

_DEMO_TEXT = "what is about nobody who is edited"
"""Description of the demo model's evaluation text, sentences about unedited people. Result files contain it."""


@dataclass(frozen=True, kw_only=True)
class GroundSpec:
    """Specification of a `Ground`, from which another process can create it.

    Attributes:
        model: `demo`, or a folder or model name, see `from_pretrained` of transformers.
        data: CounterFact, zsRE or MQuAKE file (detected by its fields); required unless the model is `demo`.
        text: file of running text; the first three quarters are anchors, the rest is used to measure drift.
        statistics: file of key statistics, used as anchors instead of the first part of `text`.
        tokens: maximum number of anchor tokens; None for the default, see `Ground`.
        tasks: folder with the tasks of GLUE and MMLU as `NAME.jsonl`.
        items: maximum number of items per task.
        device: device of the model.
        dtype: dtype of the model's weights.
        among: use only the first records of `data`.
        references: file of reference texts in the format of ROME's `attribute_snippets.json`, for the consistency
            metric; requires CounterFact in its original format.

    Example:
        >>> from rlsedit_fast.evaluation import GroundSpec
        >>> spec = GroundSpec(model="models/SmolLM2-135M", data="counterfact.json", text="text.txt", dtype="bfloat16")
        >>> spec.name, spec.identity["dtype"]
        ('SmolLM2-135M', 'bfloat16')
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
        """Name of the model in results, without its folder."""
        return DEMO if self.model == DEMO else Path(self.model).name

    @property
    def identity(self) -> dict[str, Any]:
        """Settings other than the defaults, without the device, as in result files (`made_of`).

        Files and folders are identified by name and a digest of samples of their contents, independent of their path.
        """
        default, files = GroundSpec(), {"model", "data", "text", "statistics", "tasks", "references"}
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "device"}
        found = {
            name: _named(Path(value)) if name in files else value
            for name, value in given.items()
            if value != getattr(default, name)
        }
        return found | ({"probed": _DEMO_TEXT} if self.model == DEMO else {})


_SAMPLE = 65_536
"""Bytes that are read at the beginning, middle and end of a file for its digest."""


def _named(path: Path) -> str:
    """Returns the name of a file or folder and a digest of samples of its contents, or only the name if unreadable."""
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
    """Creates the ground of a specification.

    Args:
        spec: the specification.

    Returns:
        The ground. The model is loaded by its function `load`.

    Raises:
        InputError: a file is missing or cannot be read, or references are given and scikit-learn is not installed.

    Example:
        >>> from rlsedit_fast.evaluation import GroundSpec, make_ground
        >>> ground = make_ground(GroundSpec())
        >>> model, tokenizer = ground.load()
        >>> ground.name, model.config.num_hidden_layers
        ('demo', 4)
    """
    tasks = _tasks(spec)
    similarity = None if spec.references is None else reference_similarity(Path(spec.references))
    if spec.model == DEMO:
        return Ground(
            spec.name, load_demo_model, _demo_statistics, _demo_texts, tasks, similarity, identity=spec.identity
        )
    if spec.text is None:
        raise InputError("text: expected a file of running text, on which perplexity and KL are measured")
    load = partial(load_model, spec.model, dtype=spec.dtype, device=spec.device)
    lines = running_text(Path(spec.text))
    cut = len(lines) * 3 // 4
    anchors: Any = lines[:cut] if spec.statistics is None else KeyStatistics.load(Path(spec.statistics))
    probed = list(lines[cut:])
    random.Random(PROBE_SEED).shuffle(probed)
    return Ground(
        spec.name, load, lambda _seed: anchors, lambda *_: probed, tasks, similarity, spec.tokens, spec.identity
    )


@lru_cache(maxsize=4)
def _demo_statistics(seed: int) -> KeyStatistics:
    """Returns the key statistics of a seed's anchor texts for all layers; collected once for all runs of the seed."""
    model, tokenizer = load_demo_model()
    every = CONFIG.replace(layers=tuple(range(model.config.num_hidden_layers)))
    return Editor(model, tokenizer, config=every).statistics(GivenTexts(anchor_texts(_world(), seed)))


def _demo_texts(seed: int, subjects: Collection[str]) -> list[str]:
    """Returns sentences that are not anchors of a seed; sentences about unedited people come first."""
    anchors = set(anchor_texts(_world(), seed))
    others = [text for text in dict.fromkeys(anchor_texts(_world(), PROBE_SEED)) if text not in anchors]
    return sorted(others, key=lambda text: any(subject in text for subject in subjects))[:_PROBED]


def make_cases(spec: GroundSpec, kind: str, edits: int, seed: int, order: int = 0) -> tuple[list[Case], list[Case]]:
    """Creates the cases of a stream.

    The cases of the demo model have fewer prompts than in the demonstration, to save time: two paraphrases, two
    neighbors, one namesake and two other facts.

    Args:
        spec: the specification.
        kind: kind of stream, see `Kind`; `conflicting` and `related` require the demo model.
        edits: number of edits.
        seed: random seed of the choice.
        order: number of another order of the same cases; 0 for the first one.

    Returns:
        The cases in the order of editing, and those of them that later cases supersede.

    Raises:
        InputError: the kind or order is not supported, the data has fewer cases, or it does not support references.

    Example:
        >>> from rlsedit_fast.evaluation import GroundSpec, make_cases
        >>> cases, superseded = make_cases(GroundSpec(), "conflicting", 10, seed=0)
        >>> len(cases), len(superseded), cases[0].edit.subject in {case.edit.subject for case in cases[5:]}
        (10, 5, True)
    """
    if kind not in get_args(Kind):
        raise InputError(f"stream={kind!r}: expected one of {', '.join(get_args(Kind))}")
    layout = None if spec.model == DEMO or spec.data is None else layout_of(Path(spec.data))
    if spec.references is not None and layout != "counterfact":
        raise InputError(
            f"references: {spec.name if layout is None else spec.data} has no generation prompts and no ids of "
            "relations and answers; pass CounterFact in its original format as data, or no references"
        )
    superseded: list[Case] = []
    if spec.model == DEMO:
        if kind == "related":
            cases = [_trimmed(case) for case in related_cases(_world(), edits, seed)]
        elif kind == "conflicting":
            if edits % 2:
                raise InputError(f"edits={edits}: a conflicting stream edits every fact twice; pass an even number")
            superseded = [_trimmed(case) for case in world_cases(_world(), edits // 2, seed)]
            cases = superseded + edited_twice(superseded, seed)
        else:
            cases = [_trimmed(case) for case in world_cases(_world(), edits, seed)]
    elif kind != "plain":
        raise InputError(f"stream={kind!r} is supported for the demo model only; pass plain")
    elif spec.data is None:
        raise InputError("data: expected a CounterFact, zsRE or MQuAKE file")
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
            raise InputError(f"order={order}: a stream whose edits replace earlier ones has one order; pass 0")
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
    """Detects the data set of a file by the fields of its records, as `read_edits` does.

    Args:
        path: the file.

    Returns:
        Name of the data set.

    Raises:
        InputError: the file cannot be read, or contains another data set.
    """
    found = detect(read_records(path))
    if found == "edits":
        raise InputError(f"{path}: expected records of CounterFact, zsRE or MQuAKE, which contain the true answers")
    return found


def running_text(path: Path) -> list[str]:
    r"""Reads the lines of a text file that have at least eight words.

    Args:
        path: UTF-8 text file.

    Returns:
        The lines without surrounding whitespace, at least eight.

    Raises:
        InputError: the file cannot be read, is JSON Lines, or has fewer than eight such lines.

    Example:
        >>> import pathlib, tempfile
        >>> from rlsedit_fast.evaluation import running_text
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "text.txt")
        ...     _ = path.write_text("A title\n" + "One line of the text with eight words.\n" * 9)
        ...     len(running_text(path))
        9
    """
    if path.suffix == ".jsonl":
        raise InputError(
            f"{path}: expected running text with one paragraph per line, not JSON Lines; write its texts to a file"
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    found = [line for line in lines if len(line.split()) >= 8]  # no headings
    if len(found) < 8:
        raise InputError(f"{path}: {len(found)} lines of eight words or more; expected at least 8 such lines")
    return found


def _tasks(spec: GroundSpec) -> dict[str, list[Item]]:
    if spec.tasks is None:
        return {}
    paths = {name: Path(spec.tasks) / f"{name}.jsonl" for name in TASKS}
    found = {name: read_task(name, path, items=spec.items) for name, path in paths.items() if path.exists()}
    if not found:
        names = ", ".join(path.name for path in paths.values())
        raise InputError(f"the folder of tasks {spec.tasks!r} contains none of {names}; pass a folder with one of them")
    return found
