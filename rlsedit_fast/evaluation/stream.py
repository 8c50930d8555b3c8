"""Runs: a stream of edits with one setting, evaluated at checkpoints, and its result file.

A result file contains all settings that the run depends on. It is written when the run has finished, so that an
interrupted set of runs continues with the first run without a file.
"""

from __future__ import annotations

import gc
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlsedit_fast import doctor
from rlsedit_fast.editing import Editor, EditRecord
from rlsedit_fast.errors import PriorError, UpdateError
from rlsedit_fast.evaluation.ages import age_groups
from rlsedit_fast.evaluation.cases import Case
from rlsedit_fast.evaluation.chat import chat_neighbors, evaluate_chat
from rlsedit_fast.evaluation.consistency import TextSimilarity, consistency
from rlsedit_fast.evaluation.generation import fluency, free_accuracy, free_multihop
from rlsedit_fast.evaluation.metrics import (
    Before,
    Judged,
    Known,
    Report,
    judge,
    score_before,
    summarize,
)
from rlsedit_fast.evaluation.phases import Phases
from rlsedit_fast.evaluation.plan import FORMAT, Plan, finished
from rlsedit_fast.evaluation.stability import Stability, TextProbe
from rlsedit_fast.evaluation.tasks import Item, TaskResult, evaluate_task
from rlsedit_fast.files import written_whole
from rlsedit_fast.models.answers import supports_chat
from rlsedit_fast.statistics import KeyStatistics
from rlsedit_fast.statistics.sources import GivenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALONG = 150
"""Maximum number of edited cases that are evaluated at a checkpoint, evenly spaced."""

TOKENS_PER_DIMENSION, MOST_TOKENS = 20, 100_000
"""Default number of anchor tokens: per dimension of the widest key, and maximum."""

_FLUENT = 24  # maximum number of texts for fluency, and of cases for consistency


@dataclass(frozen=True)
class Ground:
    """Model and data of a stream, in addition to its cases.

    Attributes:
        name: name in results.
        load: function that loads the unedited model and its tokenizer.
        anchors: function from a seed to the anchors: texts, key statistics, or None.
        texts: function from a seed and the edited subjects to the texts on which perplexity and KL are measured.
        tasks: items by task; may be empty.
        similarity: text similarity for the consistency metric; None without reference texts.
        tokens: maximum number of tokens of anchors that are texts; None for `TOKENS_PER_DIMENSION` per dimension of the
            widest key, at most `MOST_TOKENS`.
        identity: names and digests of its files and other settings that distinguish it from another ground of the same
            name. Result files call it `made_of`.

    Example:
        >>> from rlsedit_fast.evaluation import Ground
        >>> from rlsedit_fast.world import load_demo_model
        >>> texts = ["Toze Lado Rekuno plays the clarinet ."]
        >>> ground = Ground("demo", load_demo_model, anchors=lambda seed: texts, texts=lambda seed, subjects: texts)
        >>> ground.tasks
        {}
    """

    name: str
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    anchors: Callable[[int], Any]
    texts: Callable[[int, Collection[str]], Sequence[str]]
    tasks: Mapping[str, Sequence[Item]] = field(default_factory=dict)
    similarity: TextSimilarity | None = None
    tokens: int | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class UneditedResults:
    """Results of the unedited model that the runs of one ground share. The first run that needs one computes it.

    Attributes:
        scores: scores of questions.
        tasks: results by task.
        statistics: texts of the anchors and their key statistics.
        probe: texts, maximum number of tokens, and the probe with these.
    """

    scores: Before = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    statistics: tuple[Any, KeyStatistics] | None = None
    probe: tuple[Sequence[str], int, TextProbe] | None = None


def run(
    ground: Ground,
    plan: Plan,
    cases: Sequence[Case],
    path: Path,
    *,
    superseded: Sequence[Case] = (),
    unedited: UneditedResults | None = None,
    log: Callable[[str], None] = lambda line: None,
    show: bool = False,
) -> dict[str, Any]:
    """Executes a run and writes its result file, or reads the file if it exists.

    The file is a JSON object with the settings, the machine, the versions, the seconds of each phase, and `rows`. A row
    is one figure: `edits` (number of edits applied before), `of` (edits that it refers to: `all` so far, or
    `first-last`; or text, task, layer), `metric`, `form`, `value`, and the number of samples `n`. If a rule fails (a
    singular system, an overflow), the stream ends there: `failed` has the number of edits and the reason, and the model
    is evaluated in its state before the failed batch. Any other error is raised and no file is written.

    Args:
        ground: model and data.
        plan: settings of the run; `edits` is the number of cases.
        cases: cases in the order of editing.
        path: result file.
        superseded: cases whose targets later cases replace; the model should not generate these targets.
        unedited: results of the unedited model from other runs of this ground; missing ones are added.
        log: called with lines that describe the progress.
        show: whether to show a progress bar on stderr for each phase.

    Returns:
        The contents of the file.

    Raises:
        RLSEditError: an edit is invalid, or the model cannot be edited.
    """
    known = finished(path, ground.name, plan, ground.identity)
    if known is not None:
        return known
    began = time.perf_counter()
    phases = Phases(shown=show, label=f"{plan.label}, seed {plan.seed}: ")
    unedited = UneditedResults() if unedited is None else unedited
    with phases("loading", "model") as progress:
        model, tokenizer = ground.load()
        progress(1, 1)
    cuda = next(model.parameters()).is_cuda
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    replaced = {id(case) for case in superseded}
    with phases("scores before", "prompt") as progress:
        before = score_before(model, tokenizer, cases, known=unedited.scores, progress=progress)
    probe = _probe(
        model, tokenizer, ground.texts(plan.seed, {case.edit.subject for case in cases}), plan, unedited, phases
    )
    evaluator = _Evaluator(model, tokenizer, probe, ground.tasks, before, phases)
    _enter_text(evaluator.enter, 0, probe.unedited)
    for task in ground.tasks:
        if task not in unedited.tasks:
            unedited.tasks[task] = evaluator.task(task)
        _enter_task(evaluator.enter, 0, task, unedited.tasks[task])
    in_chat = _evenly_spaced([case for case in cases if id(case) not in replaced], plan.free)
    chat_before: dict[str, int] | None = None
    if supports_chat(tokenizer):
        with phases("chat before", "prompt") as progress:
            chat_before = chat_neighbors(model, tokenizer, in_chat, progress=progress)
    editor = Editor(model, tokenizer, config=plan.config)
    anchors = _anchor(editor, ground, plan.seed, unedited, phases)
    if plan.protected:
        editor.protect(_held_out(cases), weight=plan.protected)
    groups = age_groups(len(cases), plan.config.batch_size)
    marks = _marks(groups, plan.checkpoints)
    batches: list[float] = []
    converged = applied = 0
    failed: dict[str, Any] | None = None
    with phases("edits", "edit") as progress:
        for start, stop in groups:
            edits = [case.edit for case in cases[start:stop]]
            clock = _Clock(cuda, partial(progress, total=len(cases)), start)
            evaluator.reset()
            try:
                records = editor.edit(edits, on_batch=clock.lap)
            except (UpdateError, PriorError) as error:
                failed = {"after": applied + clock.edits, "reason": str(error)}
                log(f"{plan.label}: stopped after {failed['after']} edits: {error}")
                applied = failed["after"]
                batches += clock.laps
                break
            batches += clock.laps
            applied = stop
            converged += sum(record.search_converged for record in records)
            here = [case for case in cases[start:stop] if id(case) not in replaced]
            if here and plan.checkpoints:
                found = summarize(evaluator.judge([_reduced(case) for case in here]))
                _enter_report(evaluator.enter, stop, f"{start + 1}-{stop}", found, "made")
            if stop in marks and stop < len(cases):
                so_far = _evenly_spaced([case for case in cases[:stop] if id(case) not in replaced], ALONG)
                if so_far:
                    _enter_report(evaluator.enter, stop, "all", summarize(evaluator.judge(so_far)))
                evaluator.text_and_tasks(stop)
                _enter_weights(evaluator.enter, stop, editor)
    lasting = _evenly_spaced([case for case in cases[:applied] if id(case) not in replaced], plan.judged)
    judged = evaluator.judge(lasting)
    if plan.checkpoints:
        _enter_ages(evaluator, applied, groups, cases, replaced)
    _enter_report(evaluator.enter, applied, "all", summarize(judged))
    _enter_free(evaluator, applied, _evenly_spaced(lasting, plan.free))
    if chat_before is not None:
        written = {id(case) for case in cases[:applied]}
        _enter_chat(evaluator, applied, [case for case in in_chat if id(case) in written], chat_before)
    if superseded:
        old = [verdict for one in evaluator.judge(superseded) for verdict in one["efficacy"]]
        evaluator.enter(applied, "all", "superseded", "strict", sum(v.strict for v in old) / len(old), len(old))
    evaluator.text_and_tasks(applied)
    prompts = [case.question.prompt for case in _evenly_spaced(lasting, _FLUENT)]
    if prompts:
        with phases("fluency", "text") as progress:
            entropy = fluency(model, tokenizer, prompts, tokens=50, progress=progress)
        evaluator.enter(applied, "all", "fluency", "entropy", entropy, len(prompts))
    referred = _evenly_spaced([case for case in lasting if case.references], _FLUENT)
    if ground.similarity is not None and referred:
        with phases("consistency", "text") as progress:
            similarity = consistency(model, tokenizer, referred, ground.similarity, progress=progress)
        evaluator.enter(applied, "all", "consistency", "cosine", similarity, len(referred))
    _enter_weights(evaluator.enter, applied, editor)
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "format": FORMAT,
        "ground": ground.name,
        "made_of": dict(ground.identity),
        "plan": plan.as_json(),
        **doctor.context(),
        "anchors": None if anchors is None else _described(anchors),
        "priors": [{"lam": prior.lam, "mu": prior.mu} for prior in editor.priors],
        "made": applied,
        "failed": failed,
        "not_converged": applied - converged if failed is None else None,
        "seconds_editing": sum(batches),
        "seconds_run": time.perf_counter() - began,
        "seconds_by_phase": {name: round(seconds, 3) for name, seconds in phases.seconds.items()},
        "seconds_per_batch": [round(lap, 6) for lap in batches],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else usage,
        "rows": evaluator.rows,
    }
    with written_whole(path) as (fresh,):
        Path(fresh).write_text(json.dumps(result, default=str) + "\n", encoding="utf-8")
    del editor, model, evaluator
    gc.collect()
    return result


Enter = Callable[[int, str, str, str, "float | None", int], None]


@dataclass
class _Evaluator:
    """Evaluates a model during a stream of edits and collects the rows of the result file."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    probe: TextProbe
    tasks: Mapping[str, Sequence[Item]]
    before: Before
    phases: Phases
    rows: list[dict[str, Any]] = field(default_factory=list)
    known: Known = field(default_factory=dict)
    """Scores of the model in its present state, which several evaluations share."""

    def enter(self, edits: int, of: str, metric: str, form: str, value: float | None, n: int) -> None:
        """Adds a row, unless its value is None."""
        if value is not None:
            self.rows.append({"edits": edits, "of": of, "metric": metric, "form": form, "value": value, "n": n})

    def reset(self) -> None:
        """Removes the known scores before the model changes."""
        self.known.clear()

    def judge(self, cases: Sequence[Case]) -> list[Judged]:
        """Evaluates every prompt of the cases."""
        with self.phases("judging", "prompt") as progress:
            return judge(self.model, self.tokenizer, cases, self.before, known=self.known, progress=progress)

    def task(self, name: str) -> TaskResult:
        """Evaluates a task."""
        with self.phases(f"task {name}", "answer") as progress:
            return evaluate_task(self.model, self.tokenizer, self.tasks[name], progress=progress)

    def text_and_tasks(self, edits: int) -> None:
        """Evaluates text and tasks, which do not depend on the cases."""
        with self.phases("text", "token") as progress:
            _enter_text(self.enter, edits, self.probe(self.model, progress=progress))
        for name in self.tasks:
            _enter_task(self.enter, edits, name, self.task(name))


def _probe(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    plan: Plan,
    unedited: UneditedResults,
    phases: Phases,
) -> TextProbe:
    """Returns the probe of the unedited model on texts, computed once for all runs with these texts."""
    if unedited.probe is None or unedited.probe[:2] != (texts, plan.probed):
        with phases("text", "token") as progress:
            probe = TextProbe(model, tokenizer, texts, tokens=plan.probed, progress=progress)
        unedited.probe = texts, plan.probed, probe
    return unedited.probe[2]


def _anchor(
    editor: Editor, ground: Ground, seed: int, unedited: UneditedResults, phases: Phases
) -> KeyStatistics | None:
    """Sets the anchors of the editor; the statistics of texts are collected once for all runs."""
    anchors = ground.anchors(seed)
    if anchors is None:
        return None
    if not isinstance(anchors, KeyStatistics):
        texts, found = unedited.statistics or (None, None)
        if found is None or texts is not anchors or not set(editor.layers) <= set(found.moments):
            tokens = ground.tokens
            if tokens is None:
                width = max(block.shape[1] for projection in editor.context.projections for block in projection.blocks)
                tokens = min(TOKENS_PER_DIMENSION * width, MOST_TOKENS)
            with phases("key statistics", "token") as progress:
                found = editor.statistics(GivenTexts(anchors), tokens=tokens, progress=progress)
            unedited.statistics = anchors, found
        anchors = found
    editor.anchor(anchors)
    return anchors


class _Clock:
    """Measures the seconds of each batch of a call; the first batch includes the preparation of the call."""

    def __init__(self, cuda: bool, progress: Callable[[int], None], start: int) -> None:
        self._cuda = cuda
        self._progress = progress
        self._start = start
        self._since = time.perf_counter()
        self.laps: list[float] = []
        self.edits = 0

    def lap(self, made: Sequence[EditRecord]) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps.append(now - self._since)
        self._since = now
        self.edits += len(made)
        self._progress(self._start + self.edits)


def _marks(groups: Sequence[tuple[int, int]], shares: Sequence[float]) -> set[int]:
    """Returns the ends of the groups that are nearest to some fractions of the stream."""
    ends = [stop for _, stop in groups]
    return {min(ends, key=lambda end: abs(end - share * ends[-1])) for share in shares}


def _evenly_spaced(cases: Sequence[Case], most: int | None) -> list[Case]:
    """Returns at most `most` cases, evenly spaced; None for all."""
    if most is None or len(cases) <= most:
        return list(cases)
    return [cases[at * len(cases) // most] for at in range(most)]


def _reduced(case: Case) -> Case:
    """Returns a case with the prompts that are evaluated directly after its edit and again at the end."""
    return replace(
        case,
        paraphrases=case.paraphrases[:1],
        neighbors=case.neighbors[:1],
        namesakes=(),
        same_subject=(),
        rebuilt=(),
        multihop=(),
    )


def _held_out(cases: Sequence[Case]) -> list[str]:
    """Returns the held-out prompts of the cases, without prompts that are evaluated in another case."""
    evaluated = {question.prompt for case in cases for question in (*case.neighbors, *case.rebuilt, *case.namesakes)}
    held_out = dict.fromkeys(question.prompt for case in cases for question in case.held_out)
    return [prompt for prompt in held_out if prompt not in evaluated]


def _enter_report(enter: Enter, edits: int, of: str, report: Report, when: str = "") -> None:
    prefix = f"{when}:" if when else ""
    for part, forms in report.to_json().items():
        prompts = getattr(report, part).prompts
        for form, value in forms.items():
            if form != "prompts":
                enter(edits, of, part, prefix + form, value, prompts)
    enter(edits, of, "score", prefix + "forced", report.score, report.efficacy.prompts)
    enter(edits, of, "score", prefix + "strict", report.strict_score, report.efficacy.prompts)


def _enter_ages(
    evaluator: _Evaluator,
    edits: int,
    groups: Sequence[tuple[int, int]],
    cases: Sequence[Case],
    replaced: Collection[int],
) -> None:
    """Evaluates all groups of edits at the end, with the prompts that were evaluated directly after their edits."""
    for start, stop in groups:
        here = [_reduced(case) for case in cases[start:stop] if id(case) not in replaced]
        if here and stop <= edits:
            _enter_report(evaluator.enter, edits, f"{start + 1}-{stop}", summarize(evaluator.judge(here)), "end")


def _enter_free(evaluator: _Evaluator, edits: int, cases: Sequence[Case]) -> None:
    """Evaluates greedy generation for the edited prompts, one paraphrase of each, and multi-hop questions."""
    pairs = {
        "efficacy": [(case.question.prompt, case.edit.target) for case in cases],
        "generalization": [(case.paraphrases[0].prompt, case.edit.target) for case in cases if case.paraphrases],
    }
    model, tokenizer, known = evaluator.model, evaluator.tokenizer, evaluator.known
    with evaluator.phases("free answers", "prompt") as progress:
        questions = [pair for group in pairs.values() for pair in group]
        matched = iter(free_accuracy(model, tokenizer, questions, known=known, progress=progress))
    for metric, group in pairs.items():
        if group:
            evaluator.enter(edits, "all", metric, "free", sum(next(matched) for _ in group) / len(group), len(group))
    chains = [chain for case in cases for chain in case.multihop]
    if chains:
        with evaluator.phases("free answers", "prompt") as progress:
            correct = free_multihop(model, tokenizer, chains, known=known, progress=progress)
        evaluator.enter(edits, "all", "multihop", "free", sum(correct) / len(correct), len(correct))


def _enter_chat(evaluator: _Evaluator, edits: int, cases: Sequence[Case], before: Mapping[str, int]) -> None:
    """Evaluates cases in a chat."""
    with evaluator.phases("chat", "prompt") as progress:
        found = evaluate_chat(evaluator.model, evaluator.tokenizer, cases, before, progress=progress)
    for metric, form, share in found.figures():
        evaluator.enter(edits, "all", metric, form, share.count / share.of if share.of else None, share.of)


def _enter_text(enter: Enter, edits: int, found: Stability) -> None:
    for name in ("perplexity", "kl", "top"):
        enter(edits, "text", name, "text", getattr(found, name), found.tokens)
    for name, error in (("perplexity", found.perplexity_error), ("kl", found.kl_error)):
        enter(edits, "text", name, "error", None if math.isnan(error) else error, found.tokens)


def _enter_task(enter: Enter, edits: int, task: str, found: TaskResult) -> None:
    enter(edits, "task", task, "accuracy", found.accuracy, found.items)
    enter(edits, "task", task, "error", found.error, found.items)
    enter(edits, "task", task, "cut", found.truncated, found.items)
    enter(edits, "task", task, "left out", found.skipped, found.items)


def _described(anchors: KeyStatistics) -> dict[str, Any]:
    return {"tokens": anchors.tokens, "held_out_tokens": anchors.held_out_tokens, "source": anchors.source}


def _enter_weights(enter: Enter, edits: int, editor: Editor) -> None:
    """Adds the norms of the edited weights, their changes, and the bounds of the changes."""
    if any(projection.layout for projection in editor.context.projections):
        return  # its changes are those of single experts
    for deviation, change in zip(editor.deviation(), editor.changes(), strict=True):
        moved = change.current.double() - change.original.double()
        of = f"layer {deviation.layer}"
        enter(edits, of, "weight", "norm", float(change.current.double().norm()), moved.numel())
        enter(edits, of, "weight", "spectral", _spectral(change.current.double()), 1)
        enter(edits, of, "weight", "before", float(change.original.double().norm()), moved.numel())
        enter(edits, of, "deviation", "measured", deviation.weight, moved.numel())
        if math.isfinite(deviation.weight_bound):
            enter(edits, of, "deviation", "bound", deviation.weight_bound, moved.numel())
        if deviation.anchors is not None:
            enter(edits, of, "anchors", "measured", deviation.anchors, moved.shape[1])
            if math.isfinite(deviation.anchor_bound):
                enter(edits, of, "anchors", "bound", deviation.anchor_bound, moved.shape[1])


def _spectral(matrix: Tensor) -> float:
    """Returns the largest singular value, from the smaller Gram matrix, which is faster than a full SVD."""
    smaller = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return float(torch.linalg.eigvalsh(smaller @ smaller.T)[-1].clamp_min(0).sqrt())
